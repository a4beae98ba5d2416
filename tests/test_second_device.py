"""The task "fashion" on a device that is not the CPU, by a stand-in: no tensor is left behind."""

import pytest
import torch
from second_device import DEVICE, second_device
from test_fashion import alone, settings, written  # noqa: F401

from emd_fast.run import distill
from emd_fast.tasks.fashion import Fashion


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"emd__langevin_steps": 2, "evaluation__every": 4},
        {"emd__objective": "vsd", "emd__num_classes": 0},
        {"emd__objective": "sid", "emd__weighting": "adaptive", "emd__guidance": 2.0},
        {"emd__sampling": "x_z"},
    ],
)
def test_a_run_computes_on_its_device_what_it_computes_on_the_cpu(tmp_path, monkeypatch, changes):
    chosen = settings(written(tmp_path / "data"), emd__compute__precision="float32", **changes)
    expected = distill.distill(chosen, tmp_path / "cpu")
    monkeypatch.setattr("emd_fast.tasks.fashion.distributed.default_device", lambda: DEVICE)
    with second_device(monkeypatch):
        found = distill.distill(chosen, tmp_path / "other")
    for name in ("frechet", "recall", "precision", "inception_score", "total_variation", "classifier_accuracy"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), name


def test_the_teacher_is_there_trained_or_read(tmp_path, monkeypatch):
    task = Fashion(settings(written(tmp_path / "data")))
    monkeypatch.setattr("emd_fast.tasks.fashion.distributed.default_device", lambda: DEVICE)
    with second_device(monkeypatch):
        for _ in ("trained", "read"):
            teacher = task.make_teacher(tmp_path, None)
            assert {tensor.device for tensor in (*teacher.parameters(), *teacher.buffers())} == {DEVICE}


def test_the_stand_in_refuses_what_a_gpu_refuses(monkeypatch):
    with second_device(monkeypatch):
        x, y = torch.ones(3, device=DEVICE), torch.ones(3)
        assert (x + x).device == DEVICE and (x + torch.tensor(1.0)).tolist() == [2.0, 2.0, 2.0]
        assert torch.equal(x.cpu(), y) and x[torch.tensor([0])].device == DEVICE
        for mix in (lambda: x + y, lambda: torch.where(y > 0, x, x), lambda: y[torch.tensor([0], device=DEVICE)]):
            with pytest.raises(AssertionError, match="on two devices"):
                mix()
