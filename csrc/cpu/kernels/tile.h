// Tiles: the part of each tensor that is processed in the L1 cache.
#pragma once

#include <stdint.h>

#include "types.h"

namespace emd::cpu::EMD_ISA {
namespace {

// `count` elements from `element` on of each of `samples` samples. `element` is 0 if samples > 1.
struct Tile {
  int64_t sample, samples, element, count;
  int64_t flat;  // index of its first element in a contiguous tensor

  int64_t size() const { return samples * count; }
};

struct alignas(64) Buffer {
  float data[kTile];
};

// Tile number `index` if every tile holds (a part of) one sample.
inline Tile sample_tile(const Shape& shape, int64_t index) {
  const int64_t parts = tiles_per_sample(shape);
  const int64_t sample = index / parts, element = index % parts * kTile, rest = shape.elements - element;
  return {sample, 1, element, rest < kTile ? rest : kTile, sample * shape.elements + element};
}

template <class Function>
inline void for_tiles(const Shape& shape, int64_t first, int64_t last, Function function) {
  const int64_t together = samples_per_tile(shape);
  for (int64_t i = first; i < last; i++) {
    Tile tile;
    if (together > 1) {
      const int64_t rest = shape.samples - i * together;
      tile = {i * together, rest < together ? rest : together, 0, shape.elements, i * together * shape.elements};
    } else {
      tile = sample_tile(shape, i);
    }
    function(tile);
  }
}

template <class T>
inline void read_strided(const Source& source, int64_t sample, int64_t element, int64_t count, float* out) {
  const T* base = static_cast<const T*>(source.data) + sample * source.sample_stride;
  int64_t index[kMaxDims];
  for (int d = source.dims - 1; d >= 0; d--) {
    index[d] = element % source.sizes[d];
    element /= source.sizes[d];
  }
  const int inner = source.dims - 1;
  while (count > 0) {
    int64_t offset = 0;
    for (int d = 0; d < inner; d++) offset += index[d] * source.strides[d];
    const int64_t rest = source.sizes[inner] - index[inner];
    const int64_t run = rest < count ? rest : count;
    const int64_t stride = source.strides[inner];
    const T* from = base + offset + index[inner] * stride;
    for (int64_t i = 0; i < run; i++) out[i] = to_float(from[i * stride]);
    out += run;
    count -= run;
    index[inner] = 0;
    for (int d = inner - 1; d >= 0 && ++index[d] == source.sizes[d]; d--) index[d] = 0;
  }
}

inline float* begin(const Target& target, const Tile& tile, Buffer& buffer) {
  return begin_row(target.data, target.type, tile.flat, buffer.data);
}

inline void finish(const Target& target, const Tile& tile, const float* row) {
  finish_row(target.data, target.type, tile.flat, tile.size(), row);
}

// The tile of a tensor as float32: a pointer to the tensor if it is contiguous float32, else to
// the buffer.
inline const float* read(const Source& source, const Tile& tile, int64_t elements, Buffer& buffer) {
  if (source.dense && (tile.samples == 1 || source.sample_stride == elements)) {
    return read_row(source.data, source.type, tile.sample * source.sample_stride + tile.element, tile.size(),
                    buffer.data);
  }
  for (int64_t s = 0; s < tile.samples; s++) {
    float* out = buffer.data + s * tile.count;
    switch (source.type) {
      case Type::float32: read_strided<float>(source, tile.sample + s, tile.element, tile.count, out); break;
      case Type::bfloat16: read_strided<Bfloat16>(source, tile.sample + s, tile.element, tile.count, out); break;
      case Type::float16: read_strided<Float16>(source, tile.sample + s, tile.element, tile.count, out); break;
    }
  }
  return buffer.data;
}

// Prefetches the next tile of tensors in parts, between parts of a computation. The number of
// outstanding memory requests is limited: a prefetch of a whole tile at once would stall.
class Prefetcher {
 public:
  explicit Prefetcher(const Tile& tile) : tile_(tile) {}

  void add(const void* data, Type type, int64_t tile_start) {
    const int64_t size = bytes_of(type);
    start_[count_] = static_cast<const char*>(data) + (tile_start + tile_.size()) * size;
    bytes_[count_++] = tile_.size() * size;
  }
  void add(const float* state) { add(state, Type::float32, tile_.flat); }
  // The next tile of a strided source is not contiguous and is not prefetched.
  void add(const Source& source) {
    if (source.dense) add(source.data, source.type, tile_.sample * source.sample_stride + tile_.element);
  }

  // An address past the end is harmless: a prefetch never faults.
  void prefetch(int part, int parts) const {
    for (int i = 0; i < count_; i++) {
      const int64_t from = bytes_[i] * part / parts & ~int64_t{63}, to = bytes_[i] * (part + 1) / parts;
      for (int64_t at = from; at < to; at += 64) __builtin_prefetch(start_[i] + at, 0, 2);
    }
  }

 private:
  const Tile& tile_;
  const char* start_[kMaxTerms + 2];
  int64_t bytes_[kMaxTerms + 2];
  int count_ = 0;
};

// A per-sample number in a loop over elements: one float for a tile of one sample, else one per
// element.
EMD_HD float at(float number, int64_t) { return number; }
EMD_HD float at(const float* numbers, int64_t i) { return numbers[i]; }

struct Expanded : Buffer {
  Expanded(const PerSample& numbers, const Tile& tile) {
    float* out = data;
    for (int64_t s = 0; s < tile.samples; s++) {
      const float number = number_of(numbers, tile.sample + s);
      for (int64_t i = 0; i < tile.count; i++) *out++ = number;
    }
  }
  const float* begin() const { return data; }
};

// Calls function(number...) with floats for a tile of one sample, else with arrays of one number
// per element.
template <class Function, class... Numbers>
inline void with_numbers(const Tile& tile, Function function, const Numbers&... numbers) {
  if (tile.samples == 1) {
    function(number_of(numbers, tile.sample)...);
  } else {
    function(Expanded(numbers, tile).begin()...);
  }
}

}  // namespace
}  // namespace emd::cpu::EMD_ISA
