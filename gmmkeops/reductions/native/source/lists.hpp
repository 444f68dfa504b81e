// Candidate lists: the components that each kd-tree leaf must evaluate, from upper bounds on their exponents.
//
// The bounds and the rule are those of truncation/bounds.py. The children of a node are the lanes of a vector, so that the numbers
// of a component are broadcast and nothing is gathered.
#pragma once
#include "interface.hpp"
#include "vectors.hpp"

namespace KERNELS {

// Rounding error of a bound, as a fraction of the lengths that it is computed from; smallest bound; sums so small that terms may
// have underflowed; depths below the limit from which bounds are pruned in leaves, the deepest first.
constexpr double ROUNDING = 1e-13, LOWEST = -1e308, FAINT = 1e-250, LOG2E = 1.4426950408889634;
constexpr double DEPTHS[] = {6, 4, 3, 2, 1};
constexpr int TRIES = 5;

// A growing array.
template <class T> struct Growing {
  T* items = nullptr;
  int64_t size = 0, room = 0;
  bool push(T item) {
    if (size == room) {
      const int64_t larger = room ? 2 * room : 1024;
      T* moved = (T*)realloc(items, larger * sizeof(T));
      if (!moved) return false;
      items = moved, room = larger;
    }
    items[size++] = item;
    return true;
  }
};

// DS: number of dimensions if it is at most four, otherwise 0.
template <bool full, int DS> class Refinement {
  typedef Vector<double> V;
  typedef Integers<double> I;
  static constexpr int W = LANES<double>;

 public:
  Refinement(const ListCall& call, const Level& level, bool last, Growing<int64_t>& boxes, Growing<int64_t>& index, Growing<int64_t>& lengths, Growing<double>& pruned)
      : call(call), level(level), last(last), D(DS ? DS : int(call.dimensions)), boxes(boxes), index(index), lengths(lengths), pruned(pruned) {
    const int64_t vectors = call.components + 8 * D + D * D;
    ready = (memory = (char*)aligned_alloc(64, (size_t(vectors) * sizeof(V) + 63) / 64 * 64)) != nullptr;
    u = (V*)memory, b = u + call.components, half = b + D, semi = half + D, z = semi + D, y = z + D, slope = y + D, axes = slope + D;
  }
  ~Refinement() { free(memory); }
  bool ready = false;

  // Appends the lists of the children of one node, whose own list has ``count`` components.
  Status node(int64_t box, const int64_t* list, int64_t count, double before) {
    const int64_t children = level.children;
    for (int64_t first = box * children; first < (box + 1) * children; first += W) {
      const int64_t end = first + W < (box + 1) * children ? first + W : (box + 1) * children;
      load(first, int(end - first));
      bool wanted = false;
      for (int i = 0; i < lanes; i++) wanted |= limits[i] < INFINITY;
      if (!wanted) continue;
      V best = broadcast(-double(INFINITY));
      for (int64_t j = 0; j < count; j++) u[j] = bound(list[j]), best = maximum(u[j], best);
      const Status status = call.single ? single(list, count, best, before) : several(list, count, best, before);
      if (status != DONE) return status;
    }
    return DONE;
  }

 private:
  const ListCall& call;
  const Level& level;
  const bool last;
  const int D;
  Growing<int64_t>&boxes, &index, &lengths;
  Growing<double>& pruned;
  char* memory;
  V *u, *b, *half, *semi, *z, *y, *slope, *axes;
  V reach;
  int64_t first = 0;
  int lanes = 0;
  double limits[W];
  const double* origin = nullptr;

  // Reads ``count`` boxes; the last one fills the other lanes.
  void load(int64_t from, int count) {
    first = from, lanes = count, origin = level.center + from * D;
    for (int i = 0; i < W; i++) {
      const int64_t box = from + (i < count ? i : count - 1);
      double square = 0;
      for (int d = 0; d < D; d++) {
        const double away = level.center[box * D + d] - origin[d];
        b[d][i] = away, square += away * away;
        half[d][i] = level.half[box * D + d], semi[d][i] = level.semi[box * D + d];
      }
      for (int d = 0; d < D * D; d++) axes[d][i] = level.axes[box * D * D + d];
      reach[i] = std::sqrt(square) + level.reach[box];
      double least = INFINITY;
      for (int64_t leaf = box * level.leaves; leaf < (box + 1) * level.leaves; leaf++) least = call.limit[leaf] < least ? call.limit[leaf] : least;
      limits[i] = least;
    }
  }

  // Upper bounds on the exponents of component k over the boxes.
  V bound(int64_t k) {
    const double* U = call.factor + k * call.factor_stride;
    double distance = 0;
    for (int d = 0; d < D; d++) {
      const double mean = call.means[k * D + d] - (origin[d] - call.center[d]);
      z[d] = b[d] - mean, distance += mean * mean;
    }
    V norm = V{}, box = V{}, ellipsoid = V{};
    if constexpr (full) {
      UNROLL for (int e = 0; e < D; e++) {
        V sum = V{};
        UNROLL for (int d = 0; d < D; d++) sum = fma(z[d], broadcast(U[d * D + e]), sum);
        y[e] = sum, norm = fma(sum, sum, norm);
      }
      UNROLL for (int d = 0; d < D; d++) {
        V sum = V{};
        UNROLL for (int e = 0; e < D; e++) sum = fma(y[e], broadcast(U[d * D + e]), sum);
        slope[d] = sum;
      }
    } else
      for (int d = 0; d < D; d++) {
        const double factor = U[call.spherical ? 0 : d];
        const V sum = z[d] * factor;
        slope[d] = sum * factor, norm = fma(sum, sum, norm);
      }
    UNROLL for (int e = 0; e < D; e++) {
      V t = V{};
      UNROLL for (int d = 0; d < D; d++) t = fma(slope[d], axes[d * D + e], t);
      box = fma(t < 0 ? -t : t, half[e], box);
      t *= semi[e];
      ellipsoid = fma(t, t, ellipsoid);
    }
    norm = root(norm), ellipsoid = root(ellipsoid);
    const V support = minimum(box, ellipsoid) / maximum(norm, broadcast(1e-300));
    V least = norm - support * (1 + ROUNDING) - (reach + std::sqrt(distance)) * (ROUNDING * call.sizes[k]);
    least = least > 0 ? least : V{};  // also where it is NaN
    return maximum(broadcast(call.offsets[k] + ROUNDING * std::abs(call.offsets[k])) - (0.5 - ROUNDING) * least * least, broadcast(LOWEST));
  }
  static V root(V a) {
#if defined(__AVX512F__)
    return (V)_mm512_sqrt_pd((__m512d)a);
#else
    V found;
    for (int i = 0; i < W; i++) found[i] = std::sqrt(a[i]);
    return found;
#endif
  }

  // Prunes the components whose bounds stay below the limit; the largest exponents are then complete.
  Status single(const int64_t* list, int64_t count, V best, double before) {
    for (int i = 0; i < lanes; i++) {
      if (!(limits[i] < INFINITY)) continue;
      double omitted = before;
      int64_t kept = 0;
      for (int64_t j = 0; j < count; j++) {
        const double value = u[j][i];
        if (value >= limits[i] || value >= best[i]) {
          if (!index.push(list[j])) return OUT_OF_MEMORY;
          kept++;
        } else if (value > omitted) omitted = value;
      }
      if (!boxes.push(first + i) || !lengths.push(kept) || !pruned.push(omitted)) return OUT_OF_MEMORY;
    }
    return DONE;
  }

  // Prunes components such that the sum of the exponentials of their bounds stays below that of the limit. The levels above the
  // leaves prune only what is far below it; the leaves as much as it allows, from the deepest bounds on.
  Status several(const int64_t* list, int64_t count, V best, double before) {
    const double safe = std::log(double(call.components)) + 3;
    V limit, spent;
    for (int i = 0; i < W; i++) limit[i] = limits[i] > LOWEST ? limits[i] : LOWEST, spent[i] = std::exp(before - limit[i]);
    V sums[TRIES + 1];
    for (int t = 0; t <= TRIES; t++) sums[t] = spent;
    const double shallow = last ? -DEPTHS[TRIES - 1] : -safe;
    for (int64_t j = 0; j < count; j++) {
      const V depth = u[j] - limit;
      const I below = u[j] < best;
      if (!bits((depth <= shallow) & below)) continue;
      // An upper bound on the exponential, of which only values of at most one are added.
      const V size = exp2(minimum(depth, V{}) * LOG2E) * (1 + 1e-11);
      sums[TRIES] += (V)((I)size & (depth <= -safe) & below);
      if (last) for (int t = 0; t < TRIES; t++) sums[t] += (V)((I)size & (depth <= -DEPTHS[t]) & below);
    }
    for (int i = 0; i < lanes; i++) {
      if (!(limits[i] < INFINITY)) continue;
      const bool everything = limits[i] == -INFINITY;
      double threshold = safe, left = sums[TRIES][i];
      if (last) for (int t = 0; t < TRIES; t++) if (sums[t][i] < 1 && sums[t][i] > left) threshold = DEPTHS[t], left = sums[t][i];
      int64_t kept = 0;
      for (int64_t j = 0; j < count; j++)
        if (everything || u[j][i] - limit[i] > -threshold || u[j][i] >= best[i]) {
          if (!index.push(list[j])) return OUT_OF_MEMORY;
          kept++;
        }
      double omitted = everything ? before : std::log(left) + limit[i];
      if (!everything && left < FAINT) omitted = exactly(count, i, threshold, limit[i], best[i], before);
      if (!boxes.push(first + i) || !lengths.push(kept) || !pruned.push(omitted)) return OUT_OF_MEMORY;
    }
    return DONE;
  }
  // log of the sum of the pruned exponentials, where these underflow relative to the limit.
  double exactly(int64_t count, int i, double threshold, double limit, double best, double before) {
    double most = before;
    auto omitted = [&](int64_t j) { return !(u[j][i] - limit > -threshold || u[j][i] >= best); };
    for (int64_t j = 0; j < count; j++) if (omitted(j) && u[j][i] > most) most = u[j][i];
    if (most == -INFINITY) return most;
    double sum = std::exp(before - most);
    for (int64_t j = 0; j < count; j++) if (omitted(j)) sum += std::exp(u[j][i] - most);
    return most + std::log(sum);
  }
};

template <bool full, int DS> static Status refine(const ListCall& call, const Level& level, bool last, const Lists& parents, int64_t from, int64_t to, Lists& children) {
  Growing<int64_t> boxes, index, lengths;
  Growing<double> pruned;
  Refinement<full, DS> refinement(call, level, last, boxes, index, lengths, pruned);
  Status status = refinement.ready ? DONE : OUT_OF_MEMORY;
  int64_t at = 0;
  for (int64_t p = 0; p < from; p++) at += parents.lengths[p];
  for (int64_t p = from; p < to && status == DONE; p++) {
    status = refinement.node(parents.boxes[p], parents.index + at, parents.lengths[p], parents.pruned[p]);
    at += parents.lengths[p];
  }
  children = {boxes.size, index.size, boxes.items, index.items, lengths.items, pruned.items};
  return status;
}

static Status refine_any(const ListCall& call, const Level& level, bool last, const Lists& parents, int64_t from, int64_t to, Lists& children) {
  if (!call.full) switch (call.dimensions) {
    case 1: return refine<false, 1>(call, level, last, parents, from, to, children);
    case 2: return refine<false, 2>(call, level, last, parents, from, to, children);
    case 3: return refine<false, 3>(call, level, last, parents, from, to, children);
    default: return refine<false, 0>(call, level, last, parents, from, to, children);
  }
  switch (call.dimensions) {
    case 1: return refine<true, 1>(call, level, last, parents, from, to, children);
    case 2: return refine<true, 2>(call, level, last, parents, from, to, children);
    case 3: return refine<true, 3>(call, level, last, parents, from, to, children);
    case 4: return refine<true, 4>(call, level, last, parents, from, to, children);
    default: return refine<true, 0>(call, level, last, parents, from, to, children);
  }
}

}  // namespace KERNELS
