// 3x3 convolutions with stride 1 in channels_last, by Winograd's F(2x2, 3x3) (Lavin and Gray,
// arXiv 1509.09308). Four outputs take 16 products per pair of channels instead of 36. The
// transforms of input and output only add. Their rounding errors are offset by the shorter sums.
#pragma once

#include "../kernels.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define EMD_WINOGRAD
#endif

namespace emd::cpu::EMD_ISA {
namespace {

#if defined(EMD_WINOGRAD)

// A vector of channels. kRows tiles are multiplied by two vectors at once, as many sums as the
// registers hold.
struct Vector8 {
  static constexpr int64_t kLanes = 8, kRows = 6;
  __m256 v;

  static EMD_HD Vector8 zero() { return {_mm256_setzero_ps()}; }
  static EMD_HD Vector8 all(float a) { return {_mm256_set1_ps(a)}; }
  static EMD_HD Vector8 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  EMD_HD void store(float* p) const { _mm256_storeu_ps(p, v); }
  friend EMD_HD Vector8 operator+(Vector8 a, Vector8 b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend EMD_HD Vector8 operator-(Vector8 a, Vector8 b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend EMD_HD Vector8 multiply_add(Vector8 a, Vector8 b, Vector8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
};

#if defined(__AVX512F__)
struct Vector16 {
  static constexpr int64_t kLanes = 16, kRows = 12;
  __m512 v;

  static EMD_HD Vector16 zero() { return {_mm512_setzero_ps()}; }
  static EMD_HD Vector16 all(float a) { return {_mm512_set1_ps(a)}; }
  static EMD_HD Vector16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  EMD_HD void store(float* p) const { _mm512_storeu_ps(p, v); }
  friend EMD_HD Vector16 operator+(Vector16 a, Vector16 b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend EMD_HD Vector16 operator-(Vector16 a, Vector16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend EMD_HD Vector16 multiply_add(Vector16 a, Vector16 b, Vector16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
};
#endif

// Width of a panel. Each of the 16 weight matrices (in, out) is stored in panels (in, width) of
// two vectors of outputs. The last panel may have one vector.
template <class Vector>
EMD_HD int64_t panel_width(const Winograd& op, int64_t first_out) {
  const int64_t left = op.out - first_out, most = 2 * Vector::kLanes;
  return left < most ? left : most;
}

// Weight transform G g G^T for some input channels. G = (1 0 0; 1/2 1/2 1/2; 1/2 -1/2 1/2; 0 0 1).
template <class Vector>
inline void winograd_weight(const Winograd& op, int64_t first, int64_t last) {
  constexpr int64_t kWidest = 2 * Vector::kLanes;
  const int64_t* stride = op.strides;
  for (int64_t out = 0; out < op.out; out += kWidest) {
    const int64_t width = panel_width<Vector>(op, out);
    for (int64_t in = first; in < last; in++) {
      float g[9][kWidest], rows[12][kWidest];
      for (int64_t o = 0; o < width; o++) {
        const float* from = op.weight + (out + o) * stride[0] + in * stride[1];
        for (int64_t i = 0; i < 9; i++) g[i][o] = from[i / 3 * stride[2] + i % 3 * stride[3]];
      }
      for (int64_t j = 0; j < 3; j++) {
#pragma omp simd
        for (int64_t o = 0; o < width; o++) {
          const float sum = g[j][o] + g[6 + j][o];
          rows[j][o] = g[j][o];
          rows[3 + j][o] = 0.5f * (sum + g[3 + j][o]);
          rows[6 + j][o] = 0.5f * (sum - g[3 + j][o]);
          rows[9 + j][o] = g[6 + j][o];
        }
      }
      for (int64_t i = 0; i < 4; i++) {
        float* to = op.products + (4 * i * op.out + out) * op.in + in * width;
        const int64_t next = op.in * op.out;
#pragma omp simd
        for (int64_t o = 0; o < width; o++) {
          const float a = rows[3 * i][o], b = rows[3 * i + 1][o], c = rows[3 * i + 2][o];
          to[o] = a;
          to[next + o] = 0.5f * ((a + c) + b);
          to[2 * next + o] = 0.5f * ((a + c) - b);
          to[3 * next + o] = c;
        }
      }
    }
  }
}

// Position of a tile of two by two outputs.
struct WinogradTile {
  int64_t sample, row, column;
};

EMD_HD WinogradTile winograd_tile(const Winograd& op, int64_t tile) {
  const int64_t in_row = (op.width + 1) / 2, in_sample = (op.height + 1) / 2 * in_row, place = tile % in_sample;
  return {tile / in_sample, place / in_row * 2, place % in_row * 2};
}

// Input transform B^T d B of four by four inputs d, zero outside the image.
// B^T = (1 0 -1 0; 0 1 1 0; 0 -1 1 0; 0 1 0 -1).
template <class Vector>
inline void winograd_input(const Winograd& op, const WinogradTile& tile, float* to, int64_t next) {
  const int64_t row = tile.row - 1, column = tile.column - 1;
  const float* from = op.x + tile.sample * op.of_sample + row * op.of_row + column * op.of_column;
  const bool inside = row >= 0 && column >= 0 && row + 4 <= op.height && column + 4 <= op.width;
  for (int64_t c = 0; c < op.in; c += Vector::kLanes) {
    Vector d[4][4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        const bool there = inside || (row + i >= 0 && row + i < op.height && column + j >= 0 && column + j < op.width);
        d[i][j] = there ? Vector::load(from + i * op.of_row + j * op.of_column + c) : Vector::zero();
      }
    }
    Vector e[4][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      e[0][j] = d[0][j] - d[2][j];
      e[1][j] = d[1][j] + d[2][j];
      e[2][j] = d[2][j] - d[1][j];
      e[3][j] = d[1][j] - d[3][j];
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      (e[i][0] - e[i][2]).store(to + (4 * i + 0) * next + c);
      (e[i][1] + e[i][2]).store(to + (4 * i + 1) * next + c);
      (e[i][2] - e[i][1]).store(to + (4 * i + 2) * next + c);
      (e[i][1] - e[i][3]).store(to + (4 * i + 3) * next + c);
    }
  }
}

// Matmul of x (kRows, in) with a panel of kWide vectors, to columns of y (kRows, out).
template <class Vector, int64_t kRows, int kWide>
inline void winograd_product(const Winograd& op, const float* x, const float* panel, int64_t width, float* y) {
  Vector sums[kRows][kWide];
  for (int64_t r = 0; r < kRows; r++) {
    for (int n = 0; n < kWide; n++) sums[r][n] = Vector::zero();
  }
  for (int64_t c = 0; c < op.in; c++) {
    Vector weight[kWide];
    for (int n = 0; n < kWide; n++) weight[n] = Vector::load(panel + c * width + n * Vector::kLanes);
#pragma GCC unroll 12
    for (int64_t r = 0; r < kRows; r++) {
      const Vector a = Vector::all(x[r * op.in + c]);
#pragma GCC unroll 2
      for (int n = 0; n < kWide; n++) sums[r][n] = multiply_add(a, weight[n], sums[r][n]);
    }
  }
  for (int64_t r = 0; r < kRows; r++) {
    for (int n = 0; n < kWide; n++) sums[r][n].store(y + r * op.out + n * Vector::kLanes);
  }
}

template <class Vector, int kWide>
inline void winograd_products(const Winograd& op, int64_t rows, const float* x, const float* panel, int64_t width,
                              float* y) {
  constexpr int64_t kRows = Vector::kRows;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    winograd_product<Vector, kRows, kWide>(op, x + r * op.in, panel, width, y + r * op.out);
  }
  for (; r < rows; r++) winograd_product<Vector, 1, kWide>(op, x + r * op.in, panel, width, y + r * op.out);
}

// Output transform A^T m A, plus the bias. A^T = (1 1 1 0; 0 1 -1 -1).
template <class Vector>
inline void winograd_output(const Winograd& op, const WinogradTile& tile, const float* from, int64_t next) {
  float* to = op.y + ((tile.sample * op.height + tile.row) * op.width + tile.column) * op.out;
  const bool below = tile.row + 1 < op.height, right = tile.column + 1 < op.width;
  for (int64_t c = 0; c < op.out; c += Vector::kLanes) {
    Vector e[2][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      Vector m[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) m[i] = Vector::load(from + (4 * i + j) * next + c);
      e[0][j] = m[0] + m[1] + m[2];
      e[1][j] = m[1] - m[2] - m[3];
    }
    const Vector bias = op.bias ? Vector::load(op.bias + c) : Vector::zero();
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      if (i == 1 && !below) break;
      float* at = to + i * op.width * op.out + c;
      (e[i][0] + e[i][1] + e[i][2] + bias).store(at);
      if (right) (e[i][1] - e[i][2] - e[i][3] + bias).store(at + op.out);
    }
  }
}

template <class Vector>
inline void winograd_blocks(const Winograd& op, int64_t first, int64_t last) {
  float *x = op.scratch, *y = x + 16 * op.block * op.in;
  for (int64_t b = first; b < last; b++) {
    const int64_t begin = b * op.block, left = op.tiles() - begin, tiles = left < op.block ? left : op.block;
    for (int64_t t = 0; t < tiles; t++) {
      winograd_input<Vector>(op, winograd_tile(op, begin + t), x + t * op.in, op.block * op.in);
    }
    for (int64_t i = 0; i < 16; i++) {
      const float* of = x + i * op.block * op.in;
      for (int64_t out = 0; out < op.out;) {
        const int64_t width = panel_width<Vector>(op, out);
        const float* panel = op.products + (i * op.out + out) * op.in;
        float* to = y + i * op.block * op.out + out;
        if (width < 2 * Vector::kLanes) {
          winograd_products<Vector, 1>(op, tiles, of, panel, width, to);
        } else {
          winograd_products<Vector, 2>(op, tiles, of, panel, width, to);
        }
        out += width;
      }
    }
    for (int64_t t = 0; t < tiles; t++) {
      winograd_output<Vector>(op, winograd_tile(op, begin + t), y + t * op.out, op.block * op.out);
    }
  }
}

// Calls function with the widest vector type whose lanes divide the channels.
template <class Function>
EMD_HD void with_vectors([[maybe_unused]] const Winograd& op, const Function& function) {
#if defined(__AVX512F__)
  if (op.in % Vector16::kLanes == 0 && op.out % Vector16::kLanes == 0) return function(Vector16::zero());
#endif
  function(Vector8::zero());
}

inline void winograd_weight(const Winograd& op, int64_t first, int64_t last) {
  with_vectors(op, [&]<class Vector>(Vector) { winograd_weight<Vector>(op, first, last); });
}

inline void winograd(const Winograd& op, int64_t first, int64_t last) {
  with_vectors(op, [&]<class Vector>(Vector) { winograd_blocks<Vector>(op, first, last); });
}

#else
constexpr void (*winograd_weight)(const Winograd&, int64_t, int64_t) = nullptr;
constexpr void (*winograd)(const Winograd&, int64_t, int64_t) = nullptr;
#endif

}  // namespace
}  // namespace emd::cpu::EMD_ISA
