// The kernels of one instruction set; compiled once for each of them, with KERNELS as the name of their namespace.
#include "boxes.hpp"
#include "halves.hpp"
#include "lists.hpp"
#include "matrices.hpp"
#include "tile.hpp"

namespace KERNELS {

// Rows of a tile: more of them save overhead, fewer keep the exponents of all components in cache.
static int64_t tile_rows(const Call& call, bool wide) {
  constexpr int64_t step = BLOCK * LANES<float>;
  const int64_t most = (wide ? 1 << 17 : 1 << 18) / (call.components + call.dimensions);
  const int64_t rows = most / step * step;
  return rows < step ? step : rows > 512 ? 512 : rows;
}

template <class F, class Kind, int DS> static Status sweep(const Call& call, const Parameters& parameters, Group& group, Memory& memory) {
  FlushDenormals flushed;
  const bool whole = call.ranges == 0;
  int64_t rows = tile_rows(call, sizeof(F) == 8), longest = call.components;
  if (!whole) {
    rows = longest = 1;
    for (int64_t s = group.first; s < group.last; s++) {
      const int64_t owner = call.owner[s], size = call.range[2 * s + 1] - call.range[2 * s];
      const int64_t length = call.pointer[owner + 1] - call.pointer[owner];
      rows = size > rows ? size : rows, longest = length > longest ? length : longest;
    }
  }
  Tile<F, Kind, DS> tile(call, parameters, group, memory, rows, longest);
  if (!tile.ready) return OUT_OF_MEMORY;
  if (whole) {
    for (int64_t first = group.first; first < group.last; first += rows) {
      if (__atomic_load_n(call.stop, __ATOMIC_RELAXED)) return INTERRUPTED;
      tile.evaluate(first, first + rows < group.last ? first + rows : group.last, nullptr, call.components);
      tile.add();
    }
    return DONE;
  }
  for (int64_t s = group.first; s < group.last; s++) {
    if (__atomic_load_n(call.stop, __ATOMIC_RELAXED)) return INTERRUPTED;
    const int64_t owner = call.owner[s], begin = call.pointer[owner];
    const double least = tile.evaluate(call.range[2 * s], call.range[2 * s + 1], call.index + begin, call.pointer[owner + 1] - begin);
    call.minima[s] = least;
    if (least >= call.floor[s] || call.floor[s] == -INFINITY) tile.add();
  }
  return DONE;
}

template <class F> static Status of_type(const Call& call, const Parameters& parameters, Group& group, Memory& memory) {
  if (call.family == DIAGONAL) return sweep<F, Diagonal, 0>(call, parameters, group, memory);
  if (call.family == SPHERICAL) return sweep<F, Spherical, 0>(call, parameters, group, memory);
  switch (call.dimensions) {
    case 1: return sweep<F, Full, 1>(call, parameters, group, memory);
    case 2: return sweep<F, Full, 2>(call, parameters, group, memory);
    case 3: return sweep<F, Full, 3>(call, parameters, group, memory);
    case 4: return sweep<F, Full, 4>(call, parameters, group, memory);
    default: return sweep<F, Full, 0>(call, parameters, group, memory);
  }
}

static Status run(const Call& call, const Parameters& parameters, Group& group, Memory& memory) {
  const bool doubles = call.double_points || call.double_arithmetic;
  return doubles ? of_type<double>(call, parameters, group, memory) : of_type<float>(call, parameters, group, memory);
}
static int64_t sums(const Call& call) {
  const int64_t D = call.dimensions;
  return call.family == FULL ? Full::sums(D) : call.family == DIAGONAL ? Diagonal::sums(D) : Spherical::sums(D);
}
static int64_t place(const Call& call, int64_t i, int64_t j) {
  const int64_t D = call.dimensions;
  return call.family == FULL ? Full::place(D, i, j) : call.family == DIAGONAL ? Diagonal::place(D, i, j) : Spherical::place(D, i, j);
}

extern const Kernel kernel;
const Kernel kernel = {sums, place, run, refine_any, eigenvectors, longest_axis, magnification, invert, multiply, scatter, measure, split_into_digits};

}  // namespace KERNELS
