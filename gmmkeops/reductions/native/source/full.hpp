// Full covariances: exponents, moments and gradients of one component at a block of points.
//
// Coordinates of points are stored by columns: coordinate d of vector v of a tile is X[d * S + v].
#pragma once
#include "vectors.hpp"

namespace KERNELS {

// y = U'(x - mu) of R coordinates from d on, and q - |y|^2, at N vectors of points; returns the next numbers of U.
// z holds the residuals by coordinates. ``y`` is kept if it is not null.
template <class F, int R, int N> INLINE const F* whitened(const F* u, const F* remainder, const Vector<F>* z, int d, Vector<F>* q, Vector<F>* kept) {
  typedef Vector<F> V;
  V y[R][N];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int b = 0; b < N; b++) y[r][b] = broadcast(remainder[d + r]);
  for (int j = 0; j < d; j++, u += R) {
    V t[N];
    UNROLL for (int b = 0; b < N; b++) { V v = z[j * N + b]; KEEP(v); t[b] = v; }
    UNROLL for (int r = 0; r < R; r++) {
      V w = broadcast(u[r]);
      KEEP(w);
      UNROLL for (int b = 0; b < N; b++) y[r][b] = fma(t[b], w, y[r][b]);
    }
  }
  UNROLL for (int j = 0; j < R; j++) {
    V t[N];
    UNROLL for (int b = 0; b < N; b++) { V v = z[(d + j) * N + b]; KEEP(v); t[b] = v; }
    UNROLL for (int r = j; r < R; r++) {
      V w = broadcast(*u++);
      KEEP(w);
      UNROLL for (int b = 0; b < N; b++) y[r][b] = fma(t[b], w, y[r][b]);
    }
  }
  UNROLL for (int b = 0; b < N; b++) UNROLL for (int r = 0; r < R; r++) q[b] = fnma(y[r][b], y[r][b], q[b]);
  if (kept) UNROLL for (int r = 0; r < R; r++) UNROLL for (int b = 0; b < N; b++) kept[(d + r) * N + b] = y[r][b];
  return u;
}

// pull_d += sum over R coordinates of U_dr y_r, at N vectors of points, for the coordinates that ``whitened`` used.
template <class F, int R, int N> INLINE const F* pulled(const F* u, const Vector<F>* y, int d, Vector<F>* pull) {
  typedef Vector<F> V;
  for (int j = 0; j < d; j++, u += R)
    UNROLL for (int r = 0; r < R; r++) {
      const V w = broadcast(u[r]);
      UNROLL for (int b = 0; b < N; b++) pull[j * N + b] = fma(y[(d + r) * N + b], w, pull[j * N + b]);
    }
  UNROLL for (int j = 0; j < R; j++) UNROLL for (int r = j; r < R; r++) {
    const V w = broadcast(*u++);
    UNROLL for (int b = 0; b < N; b++) pull[(d + j) * N + b] = fma(y[(d + r) * N + b], w, pull[(d + j) * N + b]);
  }
  return u;
}

// out += sum over n vectors of r a_i b_j, for R coordinates a = x - mu and C coordinates b before them.
template <class F, int R, int C> static __attribute__((noinline)) void products(const Vector<F>* __restrict r, const Vector<F>* __restrict A, const F* ma, const Vector<F>* __restrict B, const F* mb, int n, long S, double* out) {
  typedef Vector<F> V;
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
  add_sums<F, R * C>(sums, out);
}

// The products of R coordinates with themselves (j <= i), and with ones.
template <class F, int R> static __attribute__((noinline)) void triangle(const Vector<F>* __restrict r, const Vector<F>* __restrict A, const F* ma, int n, long S, double* out) {
  typedef Vector<F> V;
  constexpr int N = R * (R + 1) / 2 + R;
  V sums[N];
  UNROLL for (int i = 0; i < N; i++) sums[i] = V{};
  for (int v = 0; v < n; v++) {
    V z[R];
    const V w = r[v];
    UNROLL for (int i = 0; i < R; i++) { V t = A[i * S + v] - ma[i]; KEEP(t); z[i] = t; }
    UNROLL for (int i = 0; i < R; i++) {
      const V a = w * z[i];
      UNROLL for (int j = 0; j <= i; j++) sums[i * (i + 1) / 2 + j] = fma(a, z[j], sums[i * (i + 1) / 2 + j]);
      sums[R * (R + 1) / 2 + i] += a;
    }
  }
  add_sums<F, N>(sums, out);
}

struct Full {
  static constexpr bool paired = false;
  static int64_t numbers(int64_t D) { return 2 * D + D * (D + 1) / 2 + 1; }
  static int64_t sums(int64_t D) { return (D + 1) * (D + 2) / 2; }

  // Sums are stored in the order in which ``moments`` computes them: for each panel of up to ROWS coordinates, its products
  // with COLUMNS coordinates before it at a time, its triangle and its sums; the total of the responsibilities last.
  static int64_t place(int64_t D, int64_t i, int64_t j) {
    if (i == D && j == D) return sums(D) - 1;
    const int64_t panel = (i == D ? j : i) / ROWS * ROWS, R = D - panel < ROWS ? D - panel : ROWS;
    const int64_t before = panel * (panel + 1) / 2 + panel;  // sums of the panels before this one
    if (i == D) return before + R * panel + R * (R + 1) / 2 + (j - panel);
    if (j >= panel) return before + R * panel + (i - panel) * (i - panel + 1) / 2 + (j - panel);
    return before + j / COLUMNS * COLUMNS * R + (i - panel) * COLUMNS + j % COLUMNS;
  }

  // Exponents q (bits) of N vectors of points; z is space for D * N vectors. y is kept if it is not null.
  template <class F, int N, int DS> INLINE void exponents(const F* p, int D, const Vector<F>* X, long S, Vector<F>* z, Vector<F>* q, Vector<F>* y = nullptr) {
    typedef Vector<F> V;
    const F *mean = p, *remainder = p + D, *u = p + 2 * D;
    const V c = broadcast(u[D * (D + 1) / 2]);
    UNROLL for (int b = 0; b < N; b++) q[b] = c;
    if constexpr (DS > 0) {
      V near[DS * N];
      UNROLL for (int d = 0; d < DS; d++) UNROLL for (int b = 0; b < N; b++) near[d * N + b] = X[d * S + b] - mean[d];
      whitened<F, DS, N>(u, remainder, near, 0, q, y);
    } else {
      for (int d = 0; d < D; d++) {
        const V m = broadcast(mean[d]);
        UNROLL for (int b = 0; b < N; b++) z[d * N + b] = X[d * S + b] - m;
      }
      int d = 0;
      for (; d + ROWS <= D; d += ROWS) u = whitened<F, ROWS, N>(u, remainder, z, d, q, y);
      if (D - d == 3) whitened<F, 3, N>(u, remainder, z, d, q, y);
      else if (D - d == 2) whitened<F, 2, N>(u, remainder, z, d, q, y);
      else if (D - d == 1) whitened<F, 1, N>(u, remainder, z, d, q, y);
    }
  }

  // pull (D * N vectors) = U y, the gradient of -log density, but for the scale of U.
  template <class F, int N> INLINE void pull(const F* p, int D, const Vector<F>* y, Vector<F>* out) {
    const F* u = p + 2 * D;
    for (int i = 0; i < D * N; i++) out[i] = Vector<F>{};
    int d = 0;
    for (; d + ROWS <= D; d += ROWS) u = pulled<F, ROWS, N>(u, y, d, out);
    if (D - d == 3) pulled<F, 3, N>(u, y, d, out);
    else if (D - d == 2) pulled<F, 2, N>(u, y, d, out);
    else if (D - d == 1) pulled<F, 1, N>(u, y, d, out);
  }

  // Adds the moments of n vectors of points with responsibilities r about the rounded mean.
  template <class F, int R> INLINE double* panel(const Vector<F>* r, const Vector<F>* X, const F* mean, int d, int n, long S, double* out) {
    for (int j = 0; j < d; j += COLUMNS, out += R * COLUMNS)
      products<F, R, COLUMNS>(r, X + d * S, mean + d, X + j * S, mean + j, n, S, out);
    triangle<F, R>(r, X + d * S, mean + d, n, S, out);
    return out + R * (R + 1) / 2 + R;
  }
  template <class F> static void moments(const F* p, int D, const Vector<F>* r, const Vector<F>* X, int n, long S, double* out) {
    Vector<F> total = Vector<F>{};
    for (int v = 0; v < n; v++) total += r[v];
    for (int d = 0; d < D; d += ROWS) switch (D - d < ROWS ? D - d : ROWS) {
      case 4: out = panel<F, 4>(r, X, p, d, n, S, out); break;
      case 3: out = panel<F, 3>(r, X, p, d, n, S, out); break;
      case 2: out = panel<F, 2>(r, X, p, d, n, S, out); break;
      default: out = panel<F, 1>(r, X, p, d, n, S, out);
    }
    *out += double(sum_of<F>(total));
  }
  // The cost in vector instructions of the moments of one vector of points.
  static double cost(int D) { return 0.25 * D * D + 2 * D; }
  // That of writing only the points of a vector that are not negligible.
  static double compression(int D) { return 2.5 * D; }
};

}  // namespace KERNELS
