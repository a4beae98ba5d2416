"""How the CUDA kernels of group_norm divide the work (csrc/cuda/group_norm.h), compiled by a C++ compiler."""

import subprocess

import pytest
from cuda_objects import ROOT, tool

pytestmark = pytest.mark.skipif(tool("c++") is None, reason="no C++ compiler")

# (channels, positions) of the networks, with 32 groups.
ADM = [(c, p) for c in (192, 384, 576, 768, 960, 1152, 1344, 1536) for p in (4096, 1024, 256, 64)]
SD = [(c, p) for c in (320, 640, 960, 1280, 1920, 2560) for p in (4096, 1024, 256, 64)]
ODD = [(6, 35), (24, 1), (4096, 7), (128, 2**20), (100, 9), (8192, 3), (32, 1), (33, 10)]
# Shared memory of a block and of a multiprocessor, clusters.
CHIPS = {80: (166912, 167936, 0), 86: (101376, 102400, 0), 90: (232448, 233472, 1), 120: (101376, 102400, 1)}
FIELDS = "resident vector block blocks vectors rows span parts shared threads steps kept".split()
PROGRAM = """
#include <cstdio>
#include <initializer_list>
#include "%s"
int main() {
  unsigned n[5];
  long long chip[3];
  const auto read = [&] { return std::scanf("%%u %%u %%u %%u %%u", n, n + 1, n + 2, n + 3, n + 4) == 5; };
  while (read() && std::scanf("%%lld %%lld %%lld", chip, chip + 1, chip + 2) == 3) {
    const auto t = emd::cuda::norm_tile_for(n[0], n[1], n[2], n[3], n[4], true, {chip[0], chip[1], chip[2] != 0});
    for (unsigned field : {unsigned(t.resident), unsigned(t.vector), t.block, t.blocks, t.vectors, t.rows, t.span,
                           t.parts, t.shared, t.threads(), t.steps(), t.kept()}) {
      std::printf("%%u ", field);
    }
    std::printf("\\n");
  }
}
"""


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """tiles(cases): a dict of the tile of each (channels, groups, positions, bytes, tensors, chip)."""
    folder = tmp_path_factory.mktemp("tile")
    (folder / "tile.cpp").write_text(PROGRAM % (ROOT / "csrc" / "cuda" / "group_norm.h"))
    command = [str(tool("c++")), "-std=c++20", "-o", str(folder / "tile"), str(folder / "tile.cpp")]
    subprocess.run(command, check=True, capture_output=True)

    def of(cases):
        words = "".join(
            f"{c} {c // g} {p} {b} {t} {' '.join(map(str, CHIPS[chip]))}\n" for c, g, p, b, t, chip in cases
        )
        said = subprocess.run([str(folder / "tile")], input=words, capture_output=True, text=True, check=True).stdout
        return [dict(zip(FIELDS, map(int, line.split()), strict=True)) for line in said.splitlines()]

    return of


def cases(sizes):
    return [
        (c, g, p, b, t, chip)
        for c, p in sizes
        for g in {n for n in (1, 2, 3, 32, c) if c % n == 0}
        for b in (2, 4)
        for t in (1, 2)
        for chip in CHIPS
    ]


def test_a_tile_covers_every_element_once_and_fits(tiles):
    given = cases([*ADM, *SD, *ODD])
    for case, tile in zip(given, tiles(given), strict=True):
        channels, groups, positions, bytes_of, tensors, chip = case
        of_block, _, clusters = CHIPS[chip]
        assert tile["blocks"] * tile["block"] >= channels > (tile["blocks"] - 1) * tile["block"], case
        assert tile["parts"] * tile["span"] >= positions > (tile["parts"] - 1) * tile["span"], case
        assert tile["vectors"] * 8 >= tile["block"] and tile["rows"] * tile["steps"] >= tile["span"], case
        assert tile["vectors"] * tile["rows"] <= tile["threads"] <= 384, case
        assert tile["threads"] - tile["vectors"] * tile["rows"] < 32, f"{case}: idle threads"
        assert tile["shared"] <= of_block, case
        if tile["resident"]:
            assert tile["block"] % (channels // groups) == 0 and tile["block"] % 8 == 0, case
            assert tile["block"] * tile["blocks"] == channels, case
            assert tile["parts"] in ((1, 2, 4, 8) if clusters else (1,)), case
            held = tile["steps"] * tile["rows"] * tile["block"] * bytes_of * tensors
            assert tile["shared"] >= held + tile["kept"] * tile["block"] * 8
            assert tile["span"] * (tile["parts"] - 1) < positions, f"{case}: an empty part"


def test_the_networks_are_read_once_on_an_h200(tiles):
    given = [(c, 32, p, 2, tensors, 90) for c, p in [*ADM, *SD] for tensors in (1, 2)]
    streamed = {case[:5] for case, tile in zip(given, tiles(given), strict=True) if not tile["resident"]}
    # 30 or 42 channels a group make blocks of 120 or 168 channels, of which x and the gradient take too much at 64x64.
    assert streamed <= {(c, 32, 4096, 2, 2) for c in (960, 1344, 1920)}, streamed


def test_few_lanes_are_idle_at_the_channels_of_the_networks(tiles):
    given = [(c, 32, p, 2, 1, 90) for c in (192, 384, 576, 1280, 1344) for p in (4096, 1024, 256)]
    for case, tile in zip(given, tiles(given), strict=True):
        used = tile["vectors"] * tile["rows"] * tile["span"] / (tile["threads"] * tile["steps"] * tile["rows"])
        assert used >= 0.9, (case, used)


def test_there_are_enough_blocks_for_small_batches(tiles):
    given = [(c, 32, p, 2, 1, 90) for c, p in SD if p >= 256]
    for case, tile in zip(given, tiles(given), strict=True):
        assert tile["blocks"] * tile["parts"] >= 16, case
