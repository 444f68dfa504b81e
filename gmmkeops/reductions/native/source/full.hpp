// Full covariances: exponents, moments and gradients of one component at a block of points.
//
// Coordinates of points are stored by columns: coordinate d of vector v of a tile is X[d * S + v].
#pragma once
#include "interface.hpp"
#include "vectors.hpp"

namespace KERNELS {

// y = U'(x - mu) of R coordinates from d on, and q - |y|^2, at N vectors of points; returns the next numbers of U.
// ``y`` is kept if it is not null. Residuals are taken anew for each R coordinates: a copy of them would have to be stored.
template <class F, int R, int N> INLINE const F* whitened(const F* u, const F* mean, const F* remainder, const Vector<F>* X, long S, int d, Vector<F>* q, Vector<F>* kept) {
  typedef Vector<F> V;
  V y[R][N];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int b = 0; b < N; b++) y[r][b] = broadcast(remainder[d + r]);
  for (int j = 0; j < d; j++, u += R) {
    V z[N];
    UNROLL for (int b = 0; b < N; b++) { V t = X[j * S + b] - mean[j]; KEEP(t); z[b] = t; }
    UNROLL for (int r = 0; r < R; r++) {
      V w = broadcast(u[r]);
      KEEP(w);
      UNROLL for (int b = 0; b < N; b++) y[r][b] = fma(z[b], w, y[r][b]);
    }
  }
  UNROLL for (int j = 0; j < R; j++) {
    V z[N];
    UNROLL for (int b = 0; b < N; b++) { V t = X[(d + j) * S + b] - mean[d + j]; KEEP(t); z[b] = t; }
    UNROLL for (int r = j; r < R; r++) {
      V w = broadcast(*u++);
      KEEP(w);
      UNROLL for (int b = 0; b < N; b++) y[r][b] = fma(z[b], w, y[r][b]);
    }
  }
  UNROLL for (int b = 0; b < N; b++) UNROLL for (int r = 0; r < R; r++) q[b] = fnma(y[r][b], y[r][b], q[b]);
  if (kept) UNROLL for (int r = 0; r < R; r++) UNROLL for (int b = 0; b < N; b++) kept[(d + r) * N + b] = y[r][b];
  return u;
}

// pull_j += sum over R coordinates r from d on of U_jr y_r, at N vectors of points, for the coordinates that ``whitened`` used.
template <class F, int N> INLINE const F* pulled(const F* u, const Vector<F>* y, int d, int R, Vector<F>* pull) {
  for (int j = 0; j < d + R; j++) for (int r = j < d ? d : j; r < d + R; r++) {
    const Vector<F> w = broadcast(*u++);
    UNROLL for (int b = 0; b < N; b++) pull[j * N + b] = fma(y[r * N + b], w, pull[j * N + b]);
  }
  return u;
}

// Position of row i of the lower triangle of sums; rows begin at multiples of PADDING in more than four dimensions. Row D holds
// the sums of the coordinates.
INLINE int64_t row_place(int64_t D, int64_t i) {
  if (D <= 4) return i * (i + 1) / 2;
  const int64_t q = i / PADDING;
  return PADDING * (q + 1) * (PADDING * q / 2 + i % PADDING);
}

// out += sum over n vectors of r a_i b_j, for R coordinates a = x - mu from d on and C coordinates b from e < d on.
template <class F, int R, int C> static __attribute__((noinline)) void products(const Vector<F>* __restrict r, const Vector<F>* __restrict X, const F* mean, int D, int d, int e, int n, long S, double* out) {
  typedef Vector<F> V;
  const V *A = X + d * S, *B = X + e * S;
  const F *ma = mean + d, *mb = mean + e;
  V sums[R * C];
  UNROLL for (int i = 0; i < R * C; i++) sums[i] = V{};
  for (int v = 0; v < n; v++) {
    V b[C];
    const V w = r[v];
    UNROLL for (int j = 0; j < C; j++) { V t = B[j * S + v] - mb[j]; KEEP(t); b[j] = t; }
    UNROLL for (int i = 0; i < R; i++) {
      const V a = w * (A[i * S + v] - ma[i]);
      UNROLL for (int j = 0; j < C; j++) sums[i * C + j] = fma(a, b[j], sums[i * C + j]);
    }
  }
  add_sums<F, R * C>(sums, out, [&](int i) { return row_place(D, d + i / C) + e + i % C; });
}

// The products of R coordinates from d on with themselves (j <= i), and with ones.
template <class F, int R> static __attribute__((noinline)) void triangle(const Vector<F>* __restrict r, const Vector<F>* __restrict X, const F* mean, int D, int d, int n, long S, double* out) {
  typedef Vector<F> V;
  constexpr int N = R * (R + 1) / 2;
  const V* A = X + d * S;
  const F* ma = mean + d;
  V sums[N + R];
  UNROLL for (int i = 0; i < N + R; i++) sums[i] = V{};
  for (int v = 0; v < n; v++) {
    V z[R];
    const V w = r[v];
    UNROLL for (int i = 0; i < R; i++) { V t = A[i * S + v] - ma[i]; KEEP(t); z[i] = t; }
    UNROLL for (int i = 0; i < R; i++) {
      const V a = w * z[i];
      UNROLL for (int j = 0; j <= i; j++) sums[i * (i + 1) / 2 + j] = fma(a, z[j], sums[i * (i + 1) / 2 + j]);
      sums[N + i] += a;
    }
  }
  add_sums<F, N + R>(sums, out, [&](int at) {
    int i = 0, j = at;
    while (j > i) j -= ++i;
    return at < N ? row_place(D, d + i) + d + j : row_place(D, D) + d + at - N;
  });
}

// The sums over n rows of a_r z, for R numbers a of each row.
template <class F, int R> static __attribute__((noinline)) void outer(const F* a, const Vector<F>* z, int n, int width, Vector<F>* sums) {
  typedef Vector<F> V;
  V s[R];
  UNROLL for (int r = 0; r < R; r++) s[r] = V{};
  for (int i = 0; i < n; i++, a += width * LANES<F>, z += width) {
    V t = *z;
    KEEP(t);
    UNROLL for (int r = 0; r < R; r++) s[r] = fma(t, broadcast(a[r]), s[r]);
  }
  UNROLL for (int r = 0; r < R; r++) sums[r] = s[r];
}

struct Full {
  static constexpr bool paired = false;
  static int64_t numbers(int64_t D) { return 2 * D + D * (D + 1) / 2 + 1; }
  // The triangle of second moments, the sums of the coordinates, and the total of the responsibilities last.
  static int64_t sums(int64_t D) { return row_place(D, D) + (D <= 4 ? D : padded(D)) + 1; }
  static int64_t place(int64_t D, int64_t i, int64_t j) { return i == D && j == D ? sums(D) - 1 : row_place(D, i) + j; }

  // Exponents q (bits) of N vectors of points. y is kept if it is not null. DS: the number of dimensions if it is at most four.
  template <class F, int N, int DS> INLINE void exponents(const F* p, int D, const Vector<F>* X, long S, Vector<F>* q, Vector<F>* y = nullptr) {
    typedef Vector<F> V;
    const F *mean = p, *remainder = p + D, *u = p + 2 * D;
    const V c = broadcast(u[D * (D + 1) / 2]);
    UNROLL for (int b = 0; b < N; b++) q[b] = c;
    if constexpr (DS > 0) {
      whitened<F, DS, N>(u, mean, remainder, X, S, 0, q, y);
    } else {
      for (int d = 0, R; d < D; d += R) switch (R = int(panel_height(D - d))) {
        case 6: u = whitened<F, 6, N>(u, mean, remainder, X, S, d, q, y); break;
        case 5: u = whitened<F, 5, N>(u, mean, remainder, X, S, d, q, y); break;
        case 4: u = whitened<F, 4, N>(u, mean, remainder, X, S, d, q, y); break;
        default: u = whitened<F, 3, N>(u, mean, remainder, X, S, d, q, y);
      }
    }
  }

  // pull (D * N vectors) = U y, the gradient of -log density, but for the scale of U.
  template <class F, int N, int DS> INLINE void pull(const F* p, int D, const Vector<F>* y, Vector<F>* out) {
    const F* u = p + 2 * D;
    if constexpr (DS > 0) {
      UNROLL for (int j = 0; j < DS; j++) UNROLL for (int r = j; r < DS; r++) {
        Vector<F> w = broadcast(*u++);
        KEEP(w);
        UNROLL for (int b = 0; b < N; b++) out[j * N + b] = r == j ? y[r * N + b] * w : fma(y[r * N + b], w, out[j * N + b]);
      }
      return;
    }
    for (int i = 0; i < D * N; i++) out[i] = Vector<F>{};
    for (int d = 0, R; d < D; d += R) R = int(panel_height(D - d)), u = pulled<F, N>(u, y, d, R, out);
  }

  // Adds the moments of n vectors of points with responsibilities r about the rounded mean.
  template <class F, int R> INLINE void panel(const Vector<F>* r, const Vector<F>* X, const F* mean, int D, int d, int n, long S, double* out) {
    for (int e = 0; e < d; e += COLUMNS) products<F, R, COLUMNS>(r, X, mean, D, d, e, n, S, out);
    triangle<F, R>(r, X, mean, D, d, n, S, out);
  }
  template <class F> static void moments(const F* p, int D, const Vector<F>* r, const Vector<F>* X, int n, long S, double* out) {
    Vector<F> total = Vector<F>{};
    for (int v = 0; v < n; v++) total += r[v];
    for (int d = 0; d < D; d += ROWS) switch (D - d < ROWS ? D - d : ROWS) {
      case 4: panel<F, 4>(r, X, p, D, d, n, S, out); break;
      case 3: panel<F, 3>(r, X, p, D, d, n, S, out); break;
      case 2: panel<F, 2>(r, X, p, D, d, n, S, out); break;
      default: panel<F, 1>(r, X, p, D, d, n, S, out);
    }
    out[sums(D) - 1] += double(sum_of<F>(total));
  }

  template <class F> static void moments_of_rows(const F* p, int D, const Rows<F>& rows, double* out) {
    typedef Vector<F> V;
    constexpr int W = LANES<F>;
    const int width = rows.width;
    V *z = rows.space, *a = z + ROWS_AT_ONCE * width;
    const V* mean = a + ROWS_AT_ONCE * width;
    std::memcpy(a + ROWS_AT_ONCE * width, p, D * sizeof(F));
    F total = 0;
    for (int first = 0; first < rows.n; first += ROWS_AT_ONCE) {
      const int n = rows.n - first < ROWS_AT_ONCE ? rows.n - first : ROWS_AT_ONCE;
      for (int c = 0; c < width; c++) {
        V sum = V{};
        for (int i = 0; i < n; i++) {
          const V residual = rows.points[rows.index[first + i] * width + c] - mean[c], weighted = residual * rows.r[first + i];
          z[i * width + c] = residual, a[i * width + c] = weighted, sum += weighted;
        }
        add_lanes<F>(out + row_place(D, D) + c * W, sum, D - c * W);
      }
      for (int i = 0; i < n; i++) total += rows.r[first + i];
      for (int d = 0; d < D; d += W) for (int c = 0; c <= d / W; c++) {
        const int count = D - d < W ? D - d : W;
        const F* from = (const F*)a + d;
        V sums[W];
        if constexpr (W > 12) if (count > 12) outer<F, W>(from, z + c, n, width, sums);
        if constexpr (W > 8) if (count > 8 && count <= 12) outer<F, 12>(from, z + c, n, width, sums);
        if constexpr (W >= 8) if (count > 4 && count <= 8) outer<F, 8>(from, z + c, n, width, sums);
        if (count <= 4) outer<F, W < 4 ? W : 4>(from, z + c, n, width, sums);
        for (int r = 0; r < count; r++) add_lanes<F>(out + row_place(D, d + r) + c * W, sums[r], d + r + 1 - c * W);
      }
    }
    out[sums(D) - 1] += double(total);
  }
  // Adds the moments of one point with residual z and weight g.
  static void moments_of_point(const double* z, double g, int D, double* out) {
    for (int i = 0; i < D; i++) {
      double *row = out + row_place(D, i), a = g * z[i];
      for (int j = 0; j <= i; j++) row[j] += a * z[j];
      out[row_place(D, D) + i] += a;
    }
    out[sums(D) - 1] += g;
  }

  // The cost in vector instructions of the moments of one vector of points, and of one row.
  static double cost(int D) { return 0.5 * D * D + 4 * D; }
  static double row_cost(int D, int width) { return 0.5 * D * (width + 1) + 6 * width + 3; }
};

}  // namespace KERNELS
