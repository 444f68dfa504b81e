// Diagonal covariances, and spherical ones, whose factor is repeated: exponents, moments and gradients of a block of points.
#pragma once
#include "vectors.hpp"

namespace KERNELS {

struct Diagonal {
  static constexpr bool paired = true;
  static int64_t numbers(int64_t D) { return 3 * D + 1; }
  static int64_t sums(int64_t D) { return 2 * D + 1; }
  // Sums of each coordinate and of its square in turn, and the total of the responsibilities last.
  static int64_t place(int64_t D, int64_t i, int64_t j) { return i == D ? (j == D ? 2 * D : 2 * j) : 2 * i + 1; }

  // Exponents q (bits) of N vectors of points.
  template <class F, int N, int DS> INLINE void exponents(const F* p, int D, const Vector<F>* X, long S, Vector<F>*, Vector<F>* q, Vector<F>* y = nullptr) {
    const F* const both[] = {p};
    several<F, 1, N, false>(both, D, X, S, q, y);
  }
  // Those of C components, q[k * N + b]: the sum of one alone waits for its own last term. If they are expanded, y = x u - mu u
  // takes two instructions instead of three; the remainder then holds -mu u, which must be small enough (EXPANDED in native.cpp).
  template <class F, int C, int N, bool expanded> INLINE void several(const F* const* p, int D, const Vector<F>* X, long S, Vector<F>* out, Vector<F>* kept = nullptr) {
    typedef Vector<F> V;
    V q[C][N];
    UNROLL for (int k = 0; k < C; k++) UNROLL for (int b = 0; b < N; b++) q[k][b] = broadcast(p[k][3 * D]);
    for (int d = 0; d < D; d++) {
      V x[N];
      UNROLL for (int b = 0; b < N; b++) { V t = X[d * S + b]; KEEP(t); x[b] = t; }
      UNROLL for (int k = 0; k < C; k++) {
        V m = expanded ? V{} : broadcast(p[k][d]), s = broadcast(p[k][D + d]), u = broadcast(p[k][2 * D + d]);
        if constexpr (!expanded) KEEP(m);
        KEEP(s);
        KEEP(u);
        UNROLL for (int b = 0; b < N; b++) {
          const V y = fma(expanded ? x[b] : x[b] - m, u, s);
          if (kept) kept[d * N + b] = y;
          q[k][b] = fnma(y, y, q[k][b]);
        }
      }
    }
    UNROLL for (int k = 0; k < C; k++) UNROLL for (int b = 0; b < N; b++) out[k * N + b] = q[k][b];
  }
  template <class F, int N> INLINE void pull(const F* p, int D, const Vector<F>* y, Vector<F>* out) {
    for (int d = 0; d < D; d++) UNROLL for (int b = 0; b < N; b++) out[d * N + b] = y[d * N + b] * p[2 * D + d];
  }

  template <class F, int C> static __attribute__((noinline)) void squares(const Vector<F>* __restrict r, const Vector<F>* __restrict X, const int* index, const F* mean, int n, long S, double* out) {
    typedef Vector<F> V;
    V sums[2 * C];
    UNROLL for (int i = 0; i < 2 * C; i++) sums[i] = V{};
    for (int v = 0; v < n; v++) {
      const V w = r[v];
      const int at = index ? index[v] : v;
      UNROLL for (int d = 0; d < C; d++) {
        const V z = X[d * S + at] - mean[d], a = w * z;
        sums[2 * d] += a;
        sums[2 * d + 1] = fma(a, z, sums[2 * d + 1]);
      }
    }
    add_sums<F, 2 * C>(sums, out);
  }
  // Adds the moments of n vectors of points with responsibilities r, at the positions of an index (null for all in turn).
  template <class F> static void moments(const F* p, int D, const Vector<F>* r, const Vector<F>* X, int n, long S, double* out, const int* index = nullptr) {
    Vector<F> total = Vector<F>{};
    for (int v = 0; v < n; v++) total += r[v];
    constexpr int C = BYTES == 64 ? 8 : 4;
    int d = 0;
    for (; d + C <= D; d += C, out += 2 * C) squares<F, C>(r, X + d * S, index, p + d, n, S, out);
    for (; d < D; d++, out += 2) squares<F, 1>(r, X + d * S, index, p + d, n, S, out);
    *out += double(sum_of<F>(total));
  }
  static double cost(int D) { return 4.0 * D; }
  // Compressing a vector costs as much as its sums, so that it has to leave only a small part of the vectors.
  static double compression(int D) { return 3.5 * D; }
};

}  // namespace KERNELS
