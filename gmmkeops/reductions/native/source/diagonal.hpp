// Diagonal and spherical covariances: exponents, moments and gradients of a block of points.
#pragma once
#include "vectors.hpp"

namespace KERNELS {

// Spherical components have one factor u, whose square is stored, and one sum of squares.
template <bool spherical> struct Axes {
  static constexpr bool paired = true;
  static int64_t numbers(int64_t D) { return spherical ? 2 * D + 2 : 3 * D + 1; }
  // The sums of the coordinates, those of their squares, and the total of the responsibilities last.
  static int64_t sums(int64_t D) { return padded(D) + (spherical ? 1 : padded(D)) + 1; }
  static int64_t place(int64_t D, int64_t i, int64_t j) { return i < D ? squares(D, i) : j < D ? j : sums(D) - 1; }
  static int64_t squares(int64_t D, int64_t d) { return padded(D) + (spherical ? 0 : d); }

  // Exponents q (bits) of N vectors of points.
  template <class F, int N, int DS> INLINE void exponents(const F* p, int D, const Vector<F>* X, long S, Vector<F>* q, Vector<F>* y = nullptr) {
    const F* const both[] = {p};
    several<F, 1, N, false>(both, D, X, S, q, y);
  }
  // Those of C components, q[k * N + b]: the sum of one alone waits for its own last term. If they are expanded, y = x u - mu u
  // takes two instructions instead of three; the remainder then holds -mu u, which must be small enough (EXPANDED in native.cpp).
  // Spherical components then are without their remainder.
  template <class F, int C, int N, bool expanded> INLINE void several(const F* const* p, int D, const Vector<F>* X, long S, Vector<F>* out, Vector<F>* kept = nullptr) {
    typedef Vector<F> V;
    V q[C][N];
    UNROLL for (int k = 0; k < C; k++) UNROLL for (int b = 0; b < N; b++) q[k][b] = spherical ? V{} : broadcast(p[k][3 * D]);
    for (int d = 0; d < D; d++) {
      V x[N];
      UNROLL for (int b = 0; b < N; b++) { V t = X[d * S + b]; KEEP(t); x[b] = t; }
      UNROLL for (int k = 0; k < C; k++) {
        constexpr bool has_mean = spherical || !expanded, has_remainder = !spherical || !expanded;
        V m = has_mean ? broadcast(p[k][d]) : V{}, s = has_remainder ? broadcast(p[k][D + d]) : V{}, u = spherical ? V{} : broadcast(p[k][2 * D + d]);
        if constexpr (has_mean) KEEP(m);
        if constexpr (has_remainder) KEEP(s);
        if constexpr (!spherical) KEEP(u);
        UNROLL for (int b = 0; b < N; b++) {
          V y;
          if constexpr (spherical) y = expanded ? x[b] - m : x[b] - m + s;
          else y = fma(expanded ? x[b] : x[b] - m, u, s);
          if (kept) kept[d * N + b] = y;
          q[k][b] = spherical ? fma(y, y, q[k][b]) : fnma(y, y, q[k][b]);
        }
      }
    }
    UNROLL for (int k = 0; k < C; k++) UNROLL for (int b = 0; b < N; b++)
      out[k * N + b] = spherical ? fnma(q[k][b], broadcast(p[k][2 * D]), broadcast(p[k][2 * D + 1])) : q[k][b];
  }
  template <class F, int N, int DS> INLINE void pull(const F* p, int D, const Vector<F>* y, Vector<F>* out) {
    for (int d = 0; d < D; d++) UNROLL for (int b = 0; b < N; b++) out[d * N + b] = y[d * N + b] * p[spherical ? 2 * D : 2 * D + d];
  }

  // The sums of C coordinates from d on, and of their squares.
  template <class F, int C> static __attribute__((noinline)) void products(const Vector<F>* __restrict r, const Vector<F>* __restrict X, const int* index, const F* mean, int D, int d, int n, long S, double* out) {
    typedef Vector<F> V;
    V sums[2 * C];
    UNROLL for (int i = 0; i < 2 * C; i++) sums[i] = V{};
    for (int v = 0; v < n; v++) {
      const V w = r[v];
      const int at = index ? index[v] : v;
      UNROLL for (int i = 0; i < C; i++) {
        const V z = X[(d + i) * S + at] - mean[d + i], a = w * z;
        sums[2 * i] += a;
        sums[2 * i + 1] = fma(a, z, sums[2 * i + 1]);
      }
    }
    add_sums<F, 2 * C>(sums, out, [&](int i) { return i % 2 ? squares(D, d + i / 2) : d + i / 2; });
  }
  // Adds the moments of n vectors of points with responsibilities r, at the positions of an index (null for all in turn).
  template <class F> static void moments(const F* p, int D, const Vector<F>* r, const Vector<F>* X, int n, long S, double* out, const int* index = nullptr) {
    Vector<F> total = Vector<F>{};
    for (int v = 0; v < n; v++) total += r[v];
    constexpr int C = BYTES == 64 ? 8 : 4;
    int d = 0;
    for (; d + C <= D; d += C) products<F, C>(r, X, index, p, D, d, n, S, out);
    for (; d < D; d++) products<F, 1>(r, X, index, p, D, d, n, S, out);
    out[sums(D) - 1] += double(sum_of<F>(total));
  }

  // The sums of C vectors of coordinates from c on, and of their squares, over n rows from ``first`` on.
  template <class F, int C> static void products_of_rows(const Rows<F>& rows, const Vector<F>* mean, int first, int n, int c, int D, double* out) {
    typedef Vector<F> V;
    V sums[C], second[C];
    UNROLL for (int j = 0; j < C; j++) sums[j] = second[j] = V{};
    for (int i = first; i < first + n; i++) {
      const V w = broadcast(rows.r[i]), *x = rows.points + rows.index[i] * rows.width + c;
      UNROLL for (int j = 0; j < C; j++) {
        const V z = x[j] - mean[c + j], a = w * z;
        sums[j] += a, second[j] = fma(a, z, second[j]);
      }
    }
    constexpr int W = LANES<F>;
    UNROLL for (int j = 0; j < C; j++) {
      const int d = (c + j) * W;
      add_lanes<F>(out + d, sums[j], D - d);
      if constexpr (spherical) out[squares(D, 0)] += double(sum_of<F>(second[j]));
      else add_lanes<F>(out + squares(D, d), second[j], D - d);
    }
  }
  template <class F> static void moments_of_rows(const F* p, int D, const Rows<F>& rows, double* out) {
    std::memcpy(rows.space, p, D * sizeof(F));
    F total = 0;
    for (int first = 0; first < rows.n; first += ROWS_AT_ONCE) {
      const int n = rows.n - first < ROWS_AT_ONCE ? rows.n - first : ROWS_AT_ONCE;
      int c = 0;
      for (; c + 4 <= rows.width; c += 4) products_of_rows<F, 4>(rows, rows.space, first, n, c, D, out);
      for (; c < rows.width; c++) products_of_rows<F, 1>(rows, rows.space, first, n, c, D, out);
      for (int i = 0; i < n; i++) total += rows.r[first + i];
    }
    out[sums(D) - 1] += double(total);
  }
  static void moments_of_point(const double* z, double g, int D, double* out) {
    for (int d = 0; d < D; d++) out[d] += g * z[d], out[squares(D, d)] += g * z[d] * z[d];
    out[sums(D) - 1] += g;
  }
  static double cost(int D) { return 4.0 * D; }
  static double row_cost(int, int width) { return 5 * width + 3; }
};
typedef Axes<false> Diagonal;
typedef Axes<true> Spherical;

}  // namespace KERNELS
