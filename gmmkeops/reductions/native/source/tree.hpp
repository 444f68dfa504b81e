// Points sorted into kd-tree leaves, and the boxes of the nodes. The rules are those of truncation/tree.py.
//
// The order is defined without regard to rounding wherever that is possible, and neither it nor the boxes depend on the number
// of threads. This file must be compiled without contraction to fused multiply-adds, so that projections have the same bits
// everywhere.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "share.hpp"

namespace {

// Rows from which the principal axis of a node is estimated, about; rows that are read without a look at ``stop``.
constexpr int64_t AXIS_ROWS = 512, CHUNK = int64_t(1) << 16;

// Axes are multiples of 1 / GRID, so that they, and projections of float32 points on them, do not depend on rounding. Variances
// along the first coordinates are increased by multiples of PREFERRED, so that equal ones do not leave the axis undetermined.
constexpr double GRID = 1024, PREFERRED = 1.0 / (1 << 20);

constexpr double INFINITE = std::numeric_limits<double>::infinity();

bool stopped(const TreeCall& call) { return __atomic_load_n(call.stop, __ATOMIC_RELAXED) != 0; }

// The order of the points. DS: number of dimensions if it is at most four, otherwise 0.
template <class F, int DS> class Order {
 public:
  Order(const TreeCall& call, const Kernel& kernel)
      : call(call), kernel(kernel), D(DS ? DS : call.dimensions), rows((call.rows + (int64_t(1) << call.depth) - 1) >> call.depth << call.depth),
        other(new F[rows * D]), numbers{std::unique_ptr<uint32_t[]>(new uint32_t[rows]), std::unique_ptr<uint32_t[]>(new uint32_t[rows])} {}

  Status run() {
    // The last split writes the result.
    side[call.depth & 1] = {(F*)call.points, numbers[0].get()}, side[~call.depth & 1] = {other.get(), numbers[1].get()};
    const Side from = side[0], &last = side[call.depth & 1];
    Status status = chunks(rows, call.threads, [&](int64_t first, int64_t end) {
      for (int64_t i = first; i < end; i++) copy((const F*)call.x, std::min(i, call.rows - 1), from.points, i), from.number[i] = uint32_t(i);
    });
    // Every thread splits the first nodes; then each of them takes whole subtrees, which fit in its cache before long.
    int64_t level = 0;
    for (; status == DONE && level < call.depth && (int64_t(1) << level) < 8 * call.threads && (rows >> level) > CHUNK; level++) {
      Work work(rows >> level, D);
      for (int64_t node = 0; status == DONE && node < int64_t(1) << level; node++) status = split(level, node, call.threads, work);
    }
    if (status == DONE) status = share(call.threads, size_t(1) << level, [&](size_t node) {
      Work work(rows >> level, D);
      return subtree(level, int64_t(node), work);
    });
    if (status != DONE) return status;
    return chunks(rows, call.threads, [&](int64_t first, int64_t end) {
      for (int64_t i = first; i < end; i++) if (last.number[i] < call.rows) call.rank[last.number[i]] = i;
    });
  }

 private:
  struct Side { F* points; uint32_t* number; };
  struct Part { int64_t below, inside, equal, left; };
  struct Work {
    std::unique_ptr<double[]> inside;
    std::vector<double> sample, square, vectors, mean, axis;
    std::vector<Part> parts;
    Work(int64_t rows, int64_t D) : inside(new double[rows]), square(D * D), vectors(D * D), mean(D), axis(D) {}
  };
  const TreeCall& call;
  const Kernel& kernel;
  const int64_t D, rows;
  std::unique_ptr<F[]> other;
  std::unique_ptr<uint32_t[]> numbers[2];
  Side side[2];

  void copy(const F* from, int64_t i, F* to, int64_t j) const {
    for (int64_t d = 0; d < (DS ? DS : D); d++) to[j * (DS ? DS : D) + d] = from[i * (DS ? DS : D) + d];
  }
  double project(const F* x, const double* axis) const {
    double sum = double(x[0]) * axis[0];
    for (int64_t d = 1; d < (DS ? DS : D); d++) sum += double(x[d]) * axis[d];
    return sum == sum ? sum : INFINITE;  // numbers that overflow
  }
  template <class Run> Status chunks(int64_t count, int threads, Run run) const {
    return share(threads, size_t((count + CHUNK - 1) / CHUNK), [&](size_t c) {
      if (stopped(call)) return INTERRUPTED;
      run(int64_t(c) * CHUNK, std::min<int64_t>(count, int64_t(c + 1) * CHUNK));
      return DONE;
    });
  }

  Status subtree(int64_t level, int64_t node, Work& work) const {
    if (level == call.depth) return DONE;
    Status status = split(level, node, 1, work);
    for (int64_t child = 0; status == DONE && child < 2; child++) status = subtree(level + 1, 2 * node + child, work);
    return status;
  }

  // Moves the points up to the median along the principal axis to the first half, and the others to the second one. The order
  // within both is kept, and of equal projections the first ones go to the first half.
  Status split(int64_t level, int64_t node, int threads, Work& work) const {
    const int64_t count = rows >> level, half = count / 2, start = node * count;
    const F* x = side[level & 1].points + start * D;
    const uint32_t* number = side[level & 1].number + start;
    const Side to{side[~level & 1].points + start * D, side[~level & 1].number + start};
    double axis[DS ? DS : 1];
    find_axis(x, count, work);
    const double* along = work.axis.data();
    if constexpr (DS) std::copy(along, along + D, axis), along = axis;
    // The median is between two quantiles of a sample, nearly always; otherwise all projections are compared.
    double low = -INFINITE, high = INFINITE;
    if (count >= 4 * AXIS_ROWS) bracket(x, count, work, low, high);
    std::vector<Part>& parts = work.parts;
    parts.resize((count + CHUNK - 1) / CHUNK);
    int64_t below = 0, inside = 0;
    for (int attempt = 0; attempt < 2; attempt++) {
      const Status status = chunks(count, threads, [&](int64_t first, int64_t end) {
        double* found = &work.inside[first];
        int64_t less = 0, within = 0;
        for (int64_t i = first; i < end; i++) {
          const double value = project(x + i * (DS ? DS : D), along);
          found[within] = value;
          less += value < low, within += (value >= low) & (value <= high);
        }
        parts[first / CHUNK] = {less, within, 0, 0};
      });
      if (status != DONE) return status;
      below = inside = 0;
      for (const Part& part : parts) below += part.below, inside += part.inside;
      if (below < half && half <= below + inside) break;
      low = -INFINITE, high = INFINITE;
    }
    std::vector<double>& all = work.sample;
    all.resize(inside);
    int64_t at = 0;
    for (size_t c = 0; c < parts.size(); at += parts[c++].inside) std::copy_n(&work.inside[c * CHUNK], parts[c].inside, &all[at]);
    std::nth_element(all.begin(), all.begin() + (half - 1 - below), all.end());
    const double median = all[half - 1 - below];
    int64_t less = 0;
    for (size_t c = 0; c < parts.size(); less += parts[c++].below) {
      const double* found = &work.inside[c * CHUNK];
      for (int64_t i = 0; i < parts[c].inside; i++) parts[c].below += found[i] < median, parts[c].equal += found[i] == median;
    }
    int64_t ties = half - less, left = 0;
    for (Part& part : parts) {
      const int64_t taken = std::min(ties, part.equal);
      part.left = left, part.equal = taken, left += part.below + taken, ties -= taken;
    }
    return chunks(count, threads, [&](int64_t begin, int64_t end) {
      int64_t first = parts[begin / CHUNK].left, second = half + begin - first, tied = parts[begin / CHUNK].equal;
      for (int64_t i = begin; i < end; i++) {
        const double value = project(x + i * (DS ? DS : D), along);
        // Bits instead of a branch, which would be mispredicted for every other point.
        const int64_t tie = value == median, is_first = (value < median) | (tie & (tied > 0)), place = second ^ ((first ^ second) & -is_first);
        copy(x, i, to.points, place), to.number[place] = number[i];
        tied -= tie, first += is_first, second += 1 - is_first;
      }
    });
  }

  void find_axis(const F* x, int64_t count, Work& work) const {
    const int64_t stride = std::max<int64_t>(1, count / AXIS_ROWS), n = (count + stride - 1) / stride;
    std::vector<double>&z = work.sample, &mean = work.mean, &square = work.square;
    z.resize(n * D);
    std::fill(mean.begin(), mean.end(), 0.0), std::fill(square.begin(), square.end(), 0.0);
    for (int64_t i = 0; i < n; i++) for (int64_t d = 0; d < D; d++)
      z[i * D + d] = double(x[i * stride * D + d]) - double(x[d]), mean[d] += z[i * D + d];
    double largest = 1e-300;
    for (int64_t d = 0; d < D; d++) mean[d] /= double(n);
    for (int64_t i = 0; i < n; i++) for (int64_t d = 0; d < D; d++) z[i * D + d] -= mean[d], largest = std::max(largest, std::abs(z[i * D + d]));
    for (double& value : z) value /= largest;
    for (int64_t i = 0; i < n; i++) for (int64_t d = 0; d < D; d++) for (int64_t e = 0; e <= d; e++) square[d * D + e] += z[i * D + d] * z[i * D + e];
    for (int64_t d = 0; d < D; d++) {
      for (int64_t e = 0; e < d; e++) square[e * D + d] = square[d * D + e];
      square[d * D + d] += PREFERRED * double(D - d);
    }
    kernel.eigenvectors(square.data(), work.vectors.data(), D);
    int64_t best = 0, most = 0;
    for (int64_t d = 1; d < D; d++) if (square[d * D + d] > square[best * D + best]) best = d;
    std::vector<double>& axis = work.axis;
    for (int64_t d = 0; d < D; d++) axis[d] = std::nearbyint(GRID * work.vectors[best * D + d]) / GRID;
    for (int64_t d = 1; d < D; d++) if (std::abs(axis[d]) > std::abs(axis[most])) most = d;
    if (axis[most] < 0) for (double& value : axis) value = -value;
  }

  // Two quantiles of projections, 2.5 standard deviations of the sampled median apart from it.
  void bracket(const F* x, int64_t count, Work& work, double& low, double& high) const {
    const int64_t stride = std::max<int64_t>(1, count / AXIS_ROWS), n = (count + stride - 1) / stride;
    const int64_t width = int64_t(1.25 * std::sqrt(double(n))) + 2;
    std::vector<double>& sample = work.sample;
    sample.resize(n);
    for (int64_t i = 0; i < n; i++) sample[i] = project(x + i * stride * D, work.axis.data());
    std::nth_element(sample.begin(), sample.begin() + (n / 2 - width), sample.end());
    low = sample[n / 2 - width];
    std::nth_element(sample.begin() + (n / 2 - width), sample.begin() + (n / 2 + width), sample.end());
    high = sample[n / 2 + width];
  }
};

template <class F> Status order_of_type(const TreeCall& call, const Kernel& kernel) {
  switch (call.dimensions) {
    case 1: return Order<F, 1>(call, kernel).run();
    case 2: return Order<F, 2>(call, kernel).run();
    case 3: return Order<F, 3>(call, kernel).run();
    case 4: return Order<F, 4>(call, kernel).run();
    default: return Order<F, 0>(call, kernel).run();
  }
}

// The leaves' moments about their means become those of a node: its mean, and its squares divided by that of a length.
void join(const Level& leaves, const Level& level, int64_t node, const TreeCall& call) {
  const int64_t D = call.dimensions, first = node * level.leaves, last = first + level.leaves;
  double *mean = level.center + node * D, *square = level.axes + node * D * D, total = 0, length = 0;
  auto weight = [&](int64_t leaf) { return double(call.starts[leaf + 1] - call.starts[leaf]); };
  std::fill(mean, mean + D, 0.0), std::fill(square, square + D * D, 0.0);
  const double* origin = leaves.center + first * D;
  for (int64_t leaf = first; leaf < last; leaf++) {
    total += weight(leaf);
    for (int64_t d = 0; d < D; d++) mean[d] += weight(leaf) * (leaves.center[leaf * D + d] - origin[d]);
  }
  for (int64_t d = 0; d < D; d++) mean[d] = origin[d] + mean[d] / total;
  for (int64_t leaf = first; leaf < last; leaf++) {
    length = std::max(length, leaves.reach[leaf]);
    for (int64_t d = 0; d < D; d++) length = std::max(length, std::abs(leaves.center[leaf * D + d] - mean[d]));
  }
  for (int64_t leaf = first; leaf < last; leaf++) {
    const double scale = leaves.reach[leaf] / length, *own = leaves.axes + leaf * D * D, *center = leaves.center + leaf * D;
    for (int64_t d = 0; d < D; d++) for (int64_t e = 0; e < D; e++)
      square[d * D + e] += scale * scale * own[d * D + e] + weight(leaf) * ((center[d] - mean[d]) / length) * ((center[e] - mean[e]) / length);
  }
  level.reach[node] = length;
}

// Boxes of all levels. Until the end, centers are means and axes are squares; semi-axes are then standard deviations.
Status boxes(const TreeCall& call, const Kernel& kernel) {
  const int64_t D = call.dimensions, levels = call.levels;
  const Level& leaves = call.level[levels - 1];
  const size_t count = size_t(leaves.count);
  const int threads = call.rows * D < CHUNK ? 1 : call.threads;
  std::vector<double> low(count * levels * D), high(low.size()), radius(count * levels);
  const Extents extents{low.data(), high.data(), radius.data()};
  auto measure = [&](Measured what) {
    return share(threads, count, [&](size_t leaf) { return stopped(call) ? INTERRUPTED : kernel.measure(call, extents, what, int64_t(leaf)); });
  };
  auto nodes = [&](auto work) {
    for (int64_t l = 0; l < levels; l++) {
      const Level& level = call.level[l];
      const Status status = share(threads, size_t((level.count + 63) / 64), [&](size_t part) {
        if (stopped(call)) return INTERRUPTED;
        for (int64_t node = int64_t(part) * 64; node < std::min<int64_t>(level.count, int64_t(part) * 64 + 64); node++) work(l, level, node);
        return DONE;
      });
      if (status != DONE) return status;
    }
    return DONE;
  };
  auto size = [&](const Level& level, int64_t node) {
    return double(call.starts[(node + 1) * level.leaves] - call.starts[node * level.leaves]);
  };
  Status status = measure(MOMENTS);
  // Levels are joined from the coarsest to the leaves, whose own moments are needed until the end.
  if (status == DONE) status = nodes([&](int64_t l, const Level& level, int64_t node) {
    if (l < levels - 1) join(leaves, level, node, call);
    std::vector<double> V(D * D);
    double* axes = level.axes + node * D * D;
    kernel.eigenvectors(axes, V.data(), D);
    for (int64_t d = 0; d < D; d++) level.semi[node * D + d] = level.reach[node] * std::sqrt(std::max(0.0, axes[d * D + d]) / size(level, node));
    for (int64_t d = 0; d < D; d++) for (int64_t e = 0; e < D; e++) axes[d * D + e] = V[e * D + d];
  });
  if (status == DONE) status = measure(EXTREMES);
  if (status == DONE) status = nodes([&](int64_t l, const Level& level, int64_t node) {
    for (int64_t d = 0; d < D; d++) {
      double least = INFINITE, most = -INFINITE;
      for (int64_t leaf = node * level.leaves; leaf < (node + 1) * level.leaves; leaf++)
        least = std::min(least, low[(leaf * levels + l) * D + d]), most = std::max(most, high[(leaf * levels + l) * D + d]);
      const double middle = 0.5 * (least + most), half = 0.5 * (most - least);
      double& deviation = level.semi[node * D + d];
      // Any deviations are valid; these are not too small for the points, and no smaller than a normal number.
      deviation = std::max({std::hypot(deviation, middle), half / std::sqrt(size(level, node)), 1e-290});
      level.half[node * D + d] = half;
      // The first leaf of a node keeps its middle.
      low[(node * level.leaves * levels + l) * D + d] = middle;
    }
  });
  if (status == DONE) status = measure(RADII);
  if (status == DONE) status = nodes([&](int64_t l, const Level& level, int64_t node) {
    double *center = level.center + node * D, *semi = level.semi + node * D, *half = level.half + node * D, *axes = level.axes + node * D * D;
    double most = 0, longest = 1e-300, square = 0, far = 0;
    for (int64_t leaf = node * level.leaves; leaf < (node + 1) * level.leaves; leaf++) most = std::max(most, radius[leaf * levels + l]);
    for (int64_t d = 0; d < D; d++) semi[d] *= most, longest = std::max(longest, half[d]);
    for (int64_t d = 0; d < D; d++) {
      square += (half[d] / longest) * (half[d] / longest);
      for (int64_t e = 0; e < D; e++) center[d] += axes[d * D + e] * low[(node * level.leaves * levels + l) * D + e];
      far = std::max(far, std::abs(center[d]));
    }
    level.reach[node] = longest * std::sqrt(square) + far;
  });
  return status;
}

Status arrange(const TreeCall& call, const Kernel& kernel) {
  if (call.rank) {
    const Status status = call.double_points ? order_of_type<double>(call, kernel) : order_of_type<float>(call, kernel);
    if (status != DONE) return status;
  }
  return boxes(call, kernel);
}

}  // namespace
