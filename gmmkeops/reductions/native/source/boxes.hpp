// Measures of the points of one leaf for the boxes of all nodes that contain it, and the eigenvectors that are their axes; tree.hpp
// calls them.
//
// Points are relative to the first one of the leaf, and stored by columns.
#pragma once
#include "interface.hpp"
#include "vectors.hpp"

namespace KERNELS {

// Eigenvectors of a symmetric matrix in the rows of V (D, D), by cyclic Jacobi rotations; the diagonal of A becomes the eigenvalues.
static void eigenvectors(double* A, double* V, int64_t D) {
  for (int64_t i = 0; i < D * D; i++) V[i] = i % (D + 1) == 0;
  for (int sweep = 0; sweep < 50; sweep++) {
    double off = 0, all = 0;
    for (int64_t i = 0; i < D; i++) for (int64_t j = 0; j < D; j++) {
      const double square = A[i * D + j] * A[i * D + j];
      all += square, off += i == j ? 0 : square;
    }
    if (!(off > 1e-31 * all)) return;
    for (int64_t p = 0; p < D; p++) for (int64_t q = p + 1; q < D; q++) {
      const double corner = A[p * D + q], first = A[p * D + p], second = A[q * D + q];
      if (!(corner * corner > 1e-34 * std::fabs(first * second))) continue;
      const double theta = (second - first) / (2 * corner);
      const double t = (theta < 0 ? -1 : 1) / (std::fabs(theta) + std::sqrt(theta * theta + 1));
      const double c = 1 / std::sqrt(t * t + 1), s = t * c;
      auto rotate = [&](double* a, double* b) {
        for (int64_t k = 0; k < D; k++) { const double x = a[k], y = b[k]; a[k] = c * x - s * y, b[k] = s * x + c * y; }
      };
      // The columns are the rows, since the matrix is symmetric.
      rotate(A + p * D, A + q * D), rotate(V + p * D, V + q * D);
      for (int64_t k = 0; k < D; k++) A[k * D + p] = A[p * D + k], A[k * D + q] = A[q * D + k];
      A[p * D + p] = first - t * corner, A[q * D + q] = second + t * corner, A[p * D + q] = A[q * D + p] = 0;
    }
  }
}

// The eigenvector of the largest eigenvalue of a positive semidefinite matrix (D, D), of length one, and this eigenvalue.
//
// The matrix is squared and divided by its trace until it has rank one, which takes about ten products: a third of the time of all
// eigenvectors in 20 dimensions. If the largest eigenvalues are equal up to a millionth, the vector is a mixture of their
// eigenvectors. ``space`` holds 2 D D numbers.
static double longest_axis(const double* A, double* axis, int64_t D, double* space) {
  constexpr int MOST = 24;
  double *P = space, *square = space + D * D, trace = 0, rest = 1, last = 0;
  for (int64_t i = 0; i < D; i++) trace += A[i * D + i], axis[i] = i == 0;
  if (!(trace > 0)) return A[0];
  for (int64_t i = 0; i < D * D; i++) P[i] = A[i] / trace;
  // A matrix of equal eigenvalues remains as it is.
  for (int step = 0; step < MOST && rest > 1e-10 && std::abs(rest - last) > 1e-12; step++) {
    last = rest;
    trace = 0;
    for (int64_t i = 0; i < D; i++) {
      double* row = square + i * D;
      for (int64_t j = 0; j < D; j++) row[j] = 0;
      for (int64_t l = 0; l < D; l++) {
        const double factor = P[i * D + l], *other = P + l * D;
        for (int64_t j = 0; j < D; j++) row[j] += factor * other[j];
      }
      trace += row[i];
    }
    // The trace of the square of a matrix of trace one is one if the matrix has rank one.
    rest = 1 - trace;
    for (int64_t i = 0; i < D * D; i++) P[i] = square[i] / trace;
  }
  int64_t longest = 0;
  for (int64_t d = 1; d < D; d++) if (P[d * D + d] > P[longest * D + longest]) longest = d;
  double length = 0, value = 0;
  for (int64_t d = 0; d < D; d++) length += P[longest * D + d] * P[longest * D + d];
  length = std::sqrt(length);
  for (int64_t d = 0; d < D; d++) axis[d] = P[longest * D + d] / length;
  for (int64_t i = 0; i < D; i++) for (int64_t j = 0; j < D; j++) value += axis[i] * A[i * D + j] * axis[j];
  return value;
}

template <class F> class Leaf {
  typedef Vector<double> V;
  static constexpr int W = LANES<double>, POINTS = 64, VECTORS = POINTS / W, TOGETHER = 4;

 public:
  Leaf(const TreeCall& call, const Extents& extents, int64_t leaf)
      : call(call), extents(extents), leaf(leaf), D(call.dimensions), first(call.starts[leaf]), last(call.starts[leaf + 1]), points((const F*)call.points) {
    const int64_t results = D * (D + 1) / 2 + 2 * call.levels * (D + 1);
    // The size of aligned memory must be a multiple of its alignment.
    const size_t size = size_t(D * VECTORS + results) * sizeof(V) + size_t(2 * D * call.levels + 64) / 8 * 64;
    ready = (memory = (char*)aligned_alloc(64, (size + 63) / 64 * 64)) != nullptr;
    y = (V*)memory, sums = y + D * VECTORS, shift = (double*)(sums + results), scale = shift + D * call.levels;
    for (int64_t i = 0; ready && i < results; i++) sums[i] = V{};
  }
  ~Leaf() { free(memory); }
  bool ready = false;

  // The mean, the largest distance from it in a coordinate (at most twice that), and the squares divided by that length.
  void moments() {
    const Level& level = call.level[call.levels - 1];
    double *mean = level.center + leaf * D, *square = level.axes + leaf * D * D;
    V largest = V{};
    for (int64_t at = first; at < last; at += POINTS) {
      load(at, true);
      for (int64_t d = 0; d < D; d++) for (int v = 0; v < VECTORS; v++) {
        const V value = y[d * VECTORS + v];
        sums[d] += value, largest = maximum(value < 0 ? -value : value, largest);
      }
    }
    double length = 1e-290;
    for (int i = 0; i < W; i++) length = largest[i] > length ? largest[i] : length;
    for (int64_t d = 0; d < D; d++) shift[d] = sum_of<double>(sums[d]) / double(last - first), sums[d] = V{};
    for (int64_t at = first; at < last; at += POINTS) {
      const int64_t count = load(at, true);
      for (int64_t d = 0; d < D; d++) {
        for (int v = 0; v < VECTORS; v++) y[d * VECTORS + v] = (y[d * VECTORS + v] - shift[d]) / length;
        for (int64_t i = count; i < POINTS; i++) ((double*)&y[d * VECTORS])[i] = 0;
      }
      V* sum = sums;
      for (int64_t d = 0; d < D; d++) for (int64_t e = 0; e <= d; e++, sum++) {
        V total = *sum;
        for (int v = 0; v < VECTORS; v++) total = fma(y[d * VECTORS + v], y[e * VECTORS + v], total);
        *sum = total;
      }
    }
    const V* sum = sums;
    for (int64_t d = 0; d < D; d++) for (int64_t e = 0; e <= d; e++) square[d * D + e] = square[e * D + d] = sum_of<double>(*sum++);
    for (int64_t d = 0; d < D; d++) mean[d] = double(points[first * D + d]) + shift[d];
    level.reach[leaf] = length;
  }

  // The smallest and the largest coordinate along each axis of each level, relative to the mean of the node.
  void extremes() {
    V *low = sums, *high = sums + call.levels * D;
    for (int64_t i = 0; i < call.levels * D; i++) low[i] = broadcast(double(INFINITY)), high[i] = -low[i];
    for (int64_t l = 0; l < call.levels; l++) set_shift(l);
    for (int64_t at = first; at < last; at += POINTS) {
      load(at, false);
      for (int64_t l = 0; l < call.levels; l++) for (int64_t e = 0; e < D; e++) {
        V least = low[l * D + e], most = high[l * D + e];
        for (int v = 0; v < VECTORS; v += TOGETHER) {
          V t[TOGETHER];
          rotate(axes(l), e, v, t);
          UNROLL for (int i = 0; i < TOGETHER; i++) least = minimum(t[i], least), most = maximum(t[i], most);
        }
        low[l * D + e] = least, high[l * D + e] = most;
      }
    }
    for (int64_t i = 0; i < call.levels * D; i++) {
      double least = low[i][0], most = high[i][0];
      for (int j = 1; j < W; j++) least = low[i][j] < least ? low[i][j] : least, most = high[i][j] > most ? high[i][j] : most;
      extents.low[leaf * call.levels * D + i] = least - shift[i], extents.high[leaf * call.levels * D + i] = most - shift[i];
    }
  }

  // The largest distance from the middle of each node, in units of its deviations.
  void radii() {
    for (int64_t l = 0; l < call.levels; l++) {
      set_shift(l);
      const int64_t node = leaf / call.level[l].leaves;
      for (int64_t e = 0; e < D; e++) {
        shift[l * D + e] += extents.low[(node * call.level[l].leaves * call.levels + l) * D + e];
        scale[l * D + e] = 1 / call.level[l].semi[node * D + e];
      }
    }
    for (int64_t at = first; at < last; at += POINTS) {
      load(at, false);
      for (int64_t l = 0; l < call.levels; l++) for (int v = 0; v < VECTORS; v += TOGETHER) {
        V square[TOGETHER] = {}, t[TOGETHER];
        for (int64_t e = 0; e < D; e++) {
          rotate(axes(l), e, v, t);
          UNROLL for (int i = 0; i < TOGETHER; i++) t[i] = (t[i] - shift[l * D + e]) * scale[l * D + e], square[i] = fma(t[i], t[i], square[i]);
        }
        UNROLL for (int i = 0; i < TOGETHER; i++) sums[l] = maximum(square[i], sums[l]);
      }
    }
    for (int64_t l = 0; l < call.levels; l++) {
      double most = 0;
      for (int i = 0; i < W; i++) most = sums[l][i] > most ? sums[l][i] : most;
      extents.radius[leaf * call.levels + l] = std::sqrt(most);
    }
  }

 private:
  const TreeCall& call;
  const Extents& extents;
  const int64_t leaf, D, first, last;
  const F* points;
  char* memory;
  V *y, *sums;
  double *shift, *scale;

  const double* axes(int64_t l) const { return call.level[l].axes + leaf / call.level[l].leaves * D * D; }
  // Reads points; the first one of the leaf (zero), or the last one read, fills the block. Returns their number.
  int64_t load(int64_t at, bool zero) {
    const int64_t count = last - at < POINTS ? last - at : POINTS;
    for (int64_t d = 0; d < D; d++) {
      const double origin = double(points[first * D + d]);
      double* out = (double*)(y + d * VECTORS);
      const F* in = points + at * D + d;
      for (int64_t i = 0; i < count; i++) out[i] = double(in[i * D]) - origin;
      for (int64_t i = count; i < POINTS; i++) out[i] = zero ? 0 : out[count - 1];
    }
    return count;
  }
  // Coordinates of the points along one axis.
  INLINED void rotate(const double* axes, int64_t e, int v, V* t) const {
    UNROLL for (int i = 0; i < TOGETHER; i++) t[i] = y[v + i] * axes[e];
    for (int64_t d = 1; d < D; d++) {
      const V axis = broadcast(axes[d * D + e]);
      UNROLL for (int i = 0; i < TOGETHER; i++) t[i] = fma(y[d * VECTORS + v + i], axis, t[i]);
    }
  }
  // The mean of the node along its axes.
  void set_shift(int64_t l) {
    const double* center = call.level[l].center + leaf / call.level[l].leaves * D;
    for (int64_t e = 0; e < D; e++) {
      double sum = 0;
      for (int64_t d = 0; d < D; d++) sum += axes(l)[d * D + e] * (center[d] - double(points[first * D + d]));
      shift[l * D + e] = sum;
    }
  }
};

template <class F> static Status measure_type(const TreeCall& call, const Extents& extents, Measured what, int64_t leaf) {
  Leaf<F> measured(call, extents, leaf);
  if (!measured.ready) return OUT_OF_MEMORY;
  if (what == MOMENTS) measured.moments();
  else if (what == EXTREMES) measured.extremes();
  else measured.radii();
  return DONE;
}
static Status measure(const TreeCall& call, const Extents& extents, Measured what, int64_t leaf) {
  return call.double_points ? measure_type<double>(call, extents, what, leaf) : measure_type<float>(call, extents, what, leaf);
}

}  // namespace KERNELS
