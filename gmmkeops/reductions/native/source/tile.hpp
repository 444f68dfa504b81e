// One tile of points: exponents, responsibilities, and every request.
#pragma once
#include "diagonal.hpp"
#include "full.hpp"
#include "interface.hpp"

namespace KERNELS {

// Enlarges the memory of a thread if it must; returns false if there is none.
INLINE bool reserve(Memory& memory, size_t size) {
  size = (size + 127) / 64 * 64;
  if (size <= memory.size) return true;
  free(memory.bytes);
  memory.bytes = (char*)aligned_alloc(64, size), memory.size = memory.bytes ? size : 0;
  return memory.bytes != nullptr;
}

// A random number in (0, 1] for each row, whatever tile it is in (splitmix64).
INLINE double uniform(uint64_t seed, uint64_t row) {
  uint64_t s = seed * 0x9e3779b97f4a7c15u + row;
  for (int i = 0; i < 2; i++) {
    s += 0x9e3779b97f4a7c15u;
    s = (s ^ (s >> 30)) * 0xbf58476d1ce4e5b9u;
    s = (s ^ (s >> 27)) * 0x94d049bb133111ebu;
    s ^= s >> 31;
  }
  return (double(s >> 11) + 1) * 0x1p-53;
}

// Responsibilities below 2^-60 of a point's largest one change nothing, and are skipped where that saves time.
constexpr double NEGLIGIBLE = -60;
// The cost in vector instructions of writing a point of a vector elsewhere.
constexpr double COMPRESSION = BYTES == 64 ? 1 : 8;
constexpr double LN2 = 0.6931471805599453;

// F: numbers of the arithmetic. DS: number of dimensions if it is at most four and covariances are full, otherwise 0.
template <class F, class Kind, int DS> class Tile {
  typedef Vector<F> V;
  typedef Integers<F> I;
  static constexpr int W = LANES<F>, N = BLOCK;
  // Doubles of components that float32 is too inaccurate for.
  static constexpr bool mixed = sizeof(F) == 4;
  typedef Vector<double> VD;
  static constexpr int WD = LANES<double>, PER = W / WD;
  // In few dimensions all sums stay in registers; elsewhere negligible responsibilities are skipped.
  static constexpr bool skipping = DS == 0;

 public:
  Tile(const Call& call, const Parameters& parameters, Group& group, Memory& memory, int64_t rows, int64_t longest)
      : call(call), parameters(parameters), group(group), D(int(call.dimensions)), sums(Kind::sums(call.dimensions)),
        width(int(padded(call.dimensions, W) / W)), deepest(F(parameters.deepest)) {
    if constexpr (sizeof(F) == 4) packed = parameters.single;
    else packed = parameters.wide;
    // Rows of a structure of arrays whose stride is a power of two would share their cache sets.
    S = (rows + W * N - 1) / (W * N) * N + 1;
    const size_t T = S * W;
    const bool doubles = mixed && parameters.any_wide;
    size_t size = 0;
    auto take = [&](size_t bytes) { const size_t at = size; size += (bytes + 63) / 64 * 64; return at; };
    const size_t x = take(T * D * sizeof(F)), z = take(T * D * sizeof(F)), e = take(T * longest * sizeof(F)),
                 l = take(T * sizeof(F)), g = take(T * sizeof(F)), r = take(T * sizeof(F)),
                 block = take(size_t(2) * D * N * BYTES), m = take(longest * S * sizeof(uint16_t)), v = take(S * sizeof(int)),
                 xd = take(doubles ? T * D * 8 : 0), rd = take(doubles ? T * 8 : 0),
                 blockd = take(doubles ? size_t(2) * D * N * BYTES : 0),
                 best = take(call.request == TOP_K ? size_t(call.top) * N * W * 2 * 8 : 0), own = take(D * 8), near = take(width * BYTES),
                 points = take(skipping ? T * width * BYTES : 0), which = take(T * sizeof(F)), last = take((longest + 1) * sizeof(int)),
                 some = take(skipping ? size_t(2 * ROWS_AT_ONCE + 1) * width * BYTES : 0);
    ready = reserve(memory, size);
    if (!ready) return;
    char* p = memory.bytes;
    // The last lanes of rows stay zero.
    if (skipping) std::memset(p + points, 0, T * width * BYTES), std::memset(p + some, 0, size_t(2 * ROWS_AT_ONCE + 1) * width * BYTES);
    P = (V*)(p + points), index = (Index<F>*)(p + which), ends = (int*)(p + last), spaceP = (V*)(p + some);
    X = (V*)(p + x), Z = (V*)(p + z), E = (V*)(p + e), L = (V*)(p + l), G = (V*)(p + g), R = (V*)(p + r), space = (V*)(p + block);
    mask = (uint16_t*)(p + m), used = (int*)(p + v), XD = (VD*)(p + xd), RD = (VD*)(p + rd), spaceD = (VD*)(p + blockd);
    top = (double*)(p + best), residual = (double*)(p + own), center = (F*)(p + near);
    for (int d = 0; d < width * W; d++) center[d] = d < D ? F(call.center[d]) : 0;
  }

  bool ready = false;

  // Loads the rows from ``first`` to ``last`` and evaluates the components of a list (null for all). Returns the smallest
  // log-sum-exp or exponent of the request's rank; nothing is added to sums yet.
  double evaluate(int64_t first, int64_t last, const int64_t* list, int64_t count) {
    this->list = list, K = int(count), row = first, n = int(last - first);
    blocks = (n + W * N - 1) / (W * N), vectors = blocks * N;
    load();
    low = broadcast(F(INFINITY)), unbounded = false, odd = 0;
    switch (call.request) {
      case ARGMAX:
      case HARD: return largest();
      case TOP_K: return top_k();
      default: return softmax();
    }
  }

  // Adds the tile to the sums of its group.
  void add() {
    group.odd += odd;
    total();
    switch (call.request) {
      case SOFT: moments(); break;
      case HARD: assigned(); break;
      case STOCHASTIC: draw(); assigned(); break;
      case POINT_GRADIENT: gradient(); break;
      default: break;
    }
  }

 private:
  const Call& call;
  const Parameters& parameters;
  Group& group;
  Packed<F> packed;
  const int D;
  const int64_t sums;
  const int width;  // vectors of a row of coordinates
  const F deepest;  // smallest value of a row that is evaluated here
  V low;            // smallest values so far, and whether one is not finite
  bool unbounded = false;
  int64_t S, row = 0;
  const int64_t* list = nullptr;
  int K = 0, n = 0, blocks = 0, vectors = 0, odd = 0;
  V *X, *Z, *E, *L, *G, *R, *space;  // coordinates, a copy of some, exponents, log-sum-exps, factors, responsibilities
  V *P, *spaceP;                     // coordinates as rows
  Index<F>* index;                   // rows that matter to a component
  VD *XD, *RD, *spaceD;              // coordinates and responsibilities in float64
  uint16_t* mask;                    // lanes of each component and vector that are not negligible
  int *used, *ends;                  // vectors that matter to a component; ends of the points of each component
  double *top, *residual;
  F* center;

  int64_t component(int k) const { return list ? list[k] : k; }
  const F* numbers(int64_t c) const { return packed.numbers + c * packed.stride; }
  const double* numbers_wide(int64_t c) const { return parameters.wide.numbers + c * parameters.wide.stride; }
  bool wide(int64_t c) const { return mixed && parameters.any_wide && parameters.is_wide[c]; }
  V* exponents_at(int w, int k) { return E + (int64_t(w) * K + k) * N; }
  F* as(V* v) { return (F*)v; }
  static I lanes() {
    I found;
    for (int i = 0; i < W; i++) found[i] = i;
    return found;
  }

  template <class T> void copy(const T* points) {
    const T* p = points + row * D;
    // The rounded center is subtracted without rounding from points that are near it.
    if constexpr (skipping) {
      // Whole vectors are read where the points go on after a row, and the lanes of other rows are cleared.
      const int64_t after = (call.rows - row) * D;
      const I rest = lanes() < I{} + Index<F>(D - (width - 1) * W);
      for (int i = 0; i < n; i++) {
        const T* from = p + int64_t(i) * D;
        V* to = P + i * width;
        // The next tile is read from memory while this one is evaluated.
        const uintptr_t next = uintptr_t(from) + int64_t(n) * D * sizeof(T);
        for (int c = 0; c < width; c++) __builtin_prefetch((const void*)(next + c * BYTES));
        if (std::is_same_v<T, F> && int64_t(i) * D + width * W <= after)
          for (int c = 0; c < width; c++) {
            V x;
            std::memcpy(&x, from + c * W, BYTES);
            x -= ((const V*)center)[c];
            to[c] = c < width - 1 ? x : rest ? x : V{};
          }
        else for (int d = 0; d < D; d++) as(to)[d] = F(from[d]) - center[d];
      }
      for (int i = n; i < vectors * W; i++) std::memcpy(P + i * width, P + (n - 1) * width, width * BYTES);
      for (int v = 0; v < vectors; v++) for (int c = 0; c < width; c++) {
        V t[W];
        UNROLL for (int i = 0; i < W; i++) t[i] = P[(v * W + i) * width + c];
        transpose<F>(t);
        const int count = D - c * W < W ? D - c * W : W;
        for (int i = 0; i < count; i++) X[(c * W + i) * S + v] = t[i];
      }
    } else {
      F* x = as(X);
      for (int d = 0; d < DS; d++) {
        for (int i = 0; i < n; i++) x[d * S * W + i] = F(p[i * DS + d]) - center[d];
        for (int i = n; i < vectors * W; i++) x[d * S * W + i] = x[d * S * W + n - 1];
      }
    }
    if constexpr (mixed)
      if (parameters.any_wide)
        for (int64_t i = 0; i < S * W * D; i++) ((double*)XD)[i] = as(X)[i];
  }
  void load() {
    if (call.double_points) copy((const double*)call.points);
    else copy((const float*)call.points);
  }

  // Calls visit(k, q) with the exponents of each component at block w.
  template <class Visit> INLINED void each(int w, Visit visit) {
    const V* x = X + w * N;
    int k = 0;
    if constexpr (Kind::paired) {
      constexpr int C = 4;
      for (; k + C <= K; k += C) {
        const F* these[C];
        bool any_wide = false;
        for (int i = 0; i < C; i++) {
          const int64_t c = component(k + i);
          these[i] = numbers(c), any_wide |= wide(c);
        }
        if (any_wide) {
          for (int i = 0; i < C; i++) one(w, k + i, visit);
          continue;
        }
        V q[C * N];
        if (parameters.expanded) Kind::template several<F, C, N, true>(these, D, x, S, q);
        else Kind::template several<F, C, N, false>(these, D, x, S, q);
        UNROLL for (int i = 0; i < C; i++) visit(k + i, q + i * N);
      }
    }
    for (; k < K; k++) one(w, k, visit);
  }
  template <class Visit> INLINED void one(int w, int k, Visit visit) {
    const int64_t c = component(k);
    V q[N];
    if (wide(c)) exponents_wide(w, c, q);
    else if constexpr (Kind::paired) {
      const F* const single[] = {numbers(c)};
      if (parameters.expanded) Kind::template several<F, 1, N, true>(single, D, X + w * N, S, q);
      else Kind::template several<F, 1, N, false>(single, D, X + w * N, S, q);
    } else Kind::template exponents<F, N, DS>(numbers(c), D, X + w * N, S, q);
    visit(k, q);
  }
  __attribute__((noinline)) void exponents_wide(int w, int64_t c, V* q) {
    if constexpr (mixed) {
      F* out = (F*)q;
      for (int part = 0; part < PER; part++) {
        VD found[N];
        Kind::template exponents<double, N, DS>(numbers_wide(c), D, XD + (int64_t(w) * PER + part) * N, S * PER, found);
        const double* values = (const double*)found;
        for (int i = 0; i < N * WD; i++) out[part * N * WD + i] = F(values[i]);
      }
    }
  }

  void write_values(const F* values, int stride) {
    if (!call.values) return;
    if (call.double_points) for (int i = 0; i < n; i++) ((double*)call.values)[(row + i) * stride] = values[i];
    else for (int i = 0; i < n; i++) ((float*)call.values)[(row + i) * stride] = float(values[i]);
  }
  // Takes the smallest of the values L at vector v into account, and excludes its rows that are not finite or too deep.
  INLINED void check(int v) {
    low = minimum(L[v], low);
    if (bits(L[v] >= broadcast(deepest)) != (1u << W) - 1) exclude(v);
  }
  // Rows whose values are not finite, or so low that differences of exponents have lost their digits, belong to no component:
  // the caller evaluates them in float64.
  __attribute__((noinline)) void exclude(int v) {
    for (int i = v * W; i < (v + 1) * W; i++) {
      if (as(L)[i] >= deepest) continue;
      if (!std::isfinite(as(L)[i])) unbounded = true;
      as(L)[i] = F(-INFINITY), as(G)[i] = 0, odd += i < n;
      for (int d = 0; d < D; d++) {
        as(X)[d * S * W + i] = 0;
        if (skipping) as(P + i * width)[d] = 0;
        if (mixed && parameters.any_wide) ((double*)XD)[d * S * W + i] = 0;
      }
      for (int k = 0; k < K; k++) as(exponents_at(v / N, k) + v % N)[i % W] = 0;
    }
  }
  double least() const {
    double found = unbounded ? -INFINITY : INFINITY;
    for (int i = 0; i < W; i++) found = low[i] < found ? low[i] : found;
    return found;
  }

  // L: log-sum-exps. E: for the kinds of sums, 2^(e - largest e), and G the reciprocals of their sums.
  double softmax() {
    const V threshold = broadcast(F(NEGLIGIBLE));
    for (int w = 0; w < blocks; w++) {
      V most[N], sum[N];
      V* e = store(w, most);
      UNROLL for (int b = 0; b < N; b++) sum[b] = V{};
      // Rows whose exponents all are -inf get a sum that is not finite.
      for (int k = 0; k < K; k++, e += N) {
        if (skipping) {
          uint16_t* m = mask + int64_t(k) * S + w * N;
          V t[N];
          unsigned any = 0;
          UNROLL for (int b = 0; b < N; b++) {
            t[b] = e[b] - most[b];
            const unsigned lanes = bits(t[b] > threshold);
            m[b] = uint16_t(lanes), any |= lanes;
          }
          if (!any) continue;
          UNROLL for (int b = 0; b < N; b++) t[b] = exp2(t[b]), sum[b] += t[b], e[b] = t[b];
        } else
          UNROLL for (int b = 0; b < N; b++) { const V p = exp2(e[b] - most[b]); sum[b] += p; e[b] = p; }
      }
      UNROLL for (int b = 0; b < N; b++) {
        const int v = w * N + b;
        // The difference is NaN where an exponent is.
        L[v] = (most[b] + log2(sum[b])) * F(LN2) + (sum[b] - sum[b]);
        G[v] = F(1) / sum[b];
        check(v);
      }
    }
    write_values(as(L), 1);
    return least();
  }
  // Stores the exponents of all components at block w; returns the largest of each point.
  INLINED V* store(int w, V* most) {
    UNROLL for (int b = 0; b < N; b++) most[b] = broadcast(F(-INFINITY));
    V* e = exponents_at(w, 0);
    each(w, [&](int k, const V* q) __attribute__((always_inline)) {
      UNROLL for (int b = 0; b < N; b++) e[k * N + b] = q[b], most[b] = maximum(q[b], most[b]);
    });
    return e;
  }

  // L: the largest exponents. R: the positions of their components in the list.
  double largest() {
    for (int w = 0; w < blocks; w++) {
      V most[N];
      I best[N];
      UNROLL for (int b = 0; b < N; b++) most[b] = broadcast(F(-INFINITY)), best[b] = I{};
      each(w, [&](int k, const V* q) __attribute__((always_inline)) {
        const I here = I{} + k;
        UNROLL for (int b = 0; b < N; b++) best[b] = q[b] > most[b] ? here : best[b], most[b] = maximum(q[b], most[b]);
      });
      UNROLL for (int b = 0; b < N; b++) {
        L[w * N + b] = most[b] * F(LN2), ((I*)R)[w * N + b] = best[b];
        check(w * N + b);
      }
    }
    write_values(as(L), 1);
    if (call.request == ARGMAX) for (int i = 0; i < n; i++) call.labels[row + i] = label(i);
    return least();
  }
  int64_t label(int i) {
    if constexpr (sizeof(F) == 4) return component(((int32_t*)R)[i]);
    else return component(int(((int64_t*)R)[i]));
  }

  // The largest exponents, by insertion into a sorted list of each lane. L: the smallest of them.
  double top_k() {
    const int k_most = call.top;
    V* values = (V*)top;
    I* places = (I*)(values + int64_t(k_most) * N);
    for (int w = 0; w < blocks; w++) {
      for (int i = 0; i < k_most * N; i++) values[i] = broadcast(F(-INFINITY)), places[i] = I{};
      const V* smallest = values + int64_t(k_most - 1) * N;
      each(w, [&](int k, const V* q) __attribute__((always_inline)) {
        I any = I{};
        UNROLL for (int b = 0; b < N; b++) any |= q[b] > smallest[b];
        if (!bits(any)) return;
        // All vectors at once: one alone waits for each of its own comparisons.
        V v[N];
        I place[N];
        UNROLL for (int b = 0; b < N; b++) v[b] = q[b], place[b] = I{} + k;
        for (int i = 0; i < k_most; i++) UNROLL for (int b = 0; b < N; b++) {
          const V at = values[i * N + b];
          const I its = places[i * N + b], better = v[b] > at;
          values[i * N + b] = better ? v[b] : at, places[i * N + b] = better ? place[b] : its;
          v[b] = better ? at : v[b], place[b] = better ? its : place[b];
        }
      });
      UNROLL for (int b = 0; b < N; b++) {
        const int v = w * N + b;
        L[v] = values[b] * F(LN2);
        const V last = K < k_most ? broadcast(F(-INFINITY)) : smallest[b] * F(LN2);
        if (bits(L[v] >= broadcast(deepest)) != (1u << W) - 1) {
          exclude(v);
          values[b] = L[v] >= broadcast(deepest) ? values[b] : broadcast(F(-INFINITY));
        }
        low = minimum(last, low);
      }
      for (int i = 0; i < N * W && w * N * W + i < n; i++) {
        const int64_t r = row + w * N * W + i;
        for (int j = 0; j < k_most; j++) {
          const F value = as(values + j * N)[i] * F(LN2);
          if (call.double_points) ((double*)call.values)[r * k_most + j] = value;
          else ((float*)call.values)[r * k_most + j] = float(value);
          call.labels[r * k_most + j] = component(int(sizeof(F) == 4 ? ((int32_t*)(places + j * N))[i] : ((int64_t*)(places + j * N))[i]));
        }
      }
    }
    return least();
  }

  double weight(int i) const { return call.weights ? call.weights[row + i] : 1.0; }

  // Adds the weighted sum of the values, and turns G into weights of the points over the sums of their exponentials.
  void total() {
    if (call.request < SOFT) return;
    double found = 0;
    F* g = as(G);
    const F* l = as(L);
    if (call.weights)
      for (int i = 0; i < n; i++) {
        const double a = weight(i);
        if (std::isfinite(l[i])) found += a * double(l[i]);
        if (call.request == SOFT) g[i] *= F(a);
      }
    else if (odd == 0) {
      double parts[8] = {};
      for (int i = n; i < vectors * W; i++) as(L)[i] = 0;
      // Vectors of two numbers need not fill the last eight.
      const int eights = vectors * W / 8 * 8;
      for (int i = 0; i < eights; i += 8) for (int j = 0; j < 8; j++) parts[j] += double(l[i + j]);
      for (int i = eights; i < vectors * W; i++) parts[i - eights] += double(l[i]);
      for (double part : parts) found += part;
    } else
      for (int i = 0; i < n; i++) if (std::isfinite(l[i])) found += double(l[i]);
    for (int i = n; i < vectors * W; i++) g[i] = 0;
    group.total += found;
  }

  void moments() {
    for (int k = 0; k < K; k++) {
      const int64_t c = component(k);
      double* out = group.moments + c * sums;
      if (wide(c)) { moments_wide(k, c, out); continue; }
      if constexpr (DS > 0) moments_few(k, numbers(c), out);
      else moments_many(k, numbers(c), out);
    }
  }
  // In up to four dimensions all sums stay in registers.
  void moments_few(int k, const F* mean, double* out) {
    constexpr int M = (DS + 1) * (DS + 2) / 2, PAIRS = DS * (DS + 1) / 2;
    V s[M > 0 ? M : 1];
    UNROLL for (int i = 0; i < M; i++) s[i] = V{};
    const V* e = exponents_at(0, k);
    for (int w = 0; w < blocks; w++, e += int64_t(K) * N) UNROLL for (int b = 0; b < N; b++) {
      const int v = w * N + b;
      const V r = e[b] * G[v];
      V z[DS > 0 ? DS : 1];
      UNROLL for (int d = 0; d < DS; d++) z[d] = X[d * S + v] - mean[d];
      UNROLL for (int d = 0; d < DS; d++) {
        const V a = r * z[d];
        UNROLL for (int j = 0; j <= d; j++) s[d * (d + 1) / 2 + j] = fma(a, z[j], s[d * (d + 1) / 2 + j]);
        s[PAIRS + d] += a;
      }
      s[M - 1] += r;
    }
    add_sums<F, M>(s, out, [](int i) { return i; });
  }
  // Elsewhere vectors without any responsibility are skipped, and few points are taken one by one.
  void moments_many(int k, const F* p, double* out) {
    const uint16_t* m = mask + int64_t(k) * S;
    int count = 0, points = 0;
    // The masks of the vectors of block w.
    auto block = [&](int w) {
      uint64_t found = 0;
      std::memcpy(&found, m + w * N, N * sizeof(uint16_t));
      return found;
    };
    for (int w = 0; w < blocks; w++) {
      const uint64_t lanes = block(w);
      points += __builtin_popcountll(lanes);
      UNROLL for (int b = 0; b < N; b++) count += (lanes >> (16 * b) & 0xffff) != 0;
    }
    if (!count) return;
    const bool few = points * (Kind::row_cost(D, width) + COMPRESSION) < count * Kind::cost(D);
    const I lane = lanes();
    int at = 0;
    for (int w = 0; w < blocks; w++) {
      if (!block(w)) continue;
      const V* e = exponents_at(w, k);
      UNROLL for (int b = 0; b < N; b++) {
        const int v = w * N + b;
        const V r = e[b] * G[v];
        if (few) {
          compress(as(R) + at, r, m[v]), compress(index + at, lane + v * W, m[v]);
          at += __builtin_popcount(m[v]);
        } else used[at] = v, R[at] = r, at += m[v] != 0;
      }
    }
    if (few) Kind::template moments_of_rows<F>(p, D, {P, as(R), index, at, width, spaceP}, out);
    else if constexpr (Kind::paired) Kind::template moments<F>(p, D, R, X, at, S, out, at == vectors ? nullptr : used);
    else {
      if (at < vectors) for (int d = 0; d < D; d++) for (int i = 0; i < at; i++) Z[d * S + i] = X[d * S + used[i]];
      Kind::template moments<F>(p, D, R, at == vectors ? X : Z, at, S, out);
    }
  }
  __attribute__((noinline)) void moments_wide(int k, int64_t c, double* out) {
    if constexpr (mixed) {
      double* r = (double*)RD;
      for (int w = 0; w < blocks; w++) {
        const F *e = as(exponents_at(w, k)), *g = as(G + w * N);
        const uint16_t* m = mask + int64_t(k) * S + w * N;
        for (int i = 0; i < N * W; i++) r[w * N * W + i] = skipping && !(m[i / W] >> (i % W) & 1) ? 0 : double(e[i]) * double(g[i]);
      }
      Kind::template moments<double>(numbers_wide(c), D, RD, XD, vectors * PER, S * PER, out);
    }
  }

  // Draws a component for each point from its responsibilities.
  void draw() {
    for (int i = 0; i < n; i++) {
      const int v = i / W, lane = i % W;
      if (as(G)[i] == 0) continue;
      const double u = uniform(call.seed, uint64_t(row + i)) / double(as(G)[i]);
      double sum = 0;
      int last = 0;
      for (int k = 0; k < K; k++) {
        if (skipping && !(mask[int64_t(k) * S + v] >> lane & 1)) continue;
        const double p = as(exponents_at(v / N, k) + v % N)[lane];
        if (p > 0) last = k;
        sum += p;
        if (p > 0 && sum >= u) break;
      }
      if constexpr (sizeof(F) == 4) ((int32_t*)R)[i] = last;
      else ((int64_t*)R)[i] = last;
    }
  }
  // Adds each point to the sums of its component: in few dimensions, or if few points have the same one, in float64.
  void assigned() {
    if constexpr (skipping) if (K <= 4 * n) return sorted();
    for (int i = 0; i < n; i++) if (std::isfinite(as(L)[i])) add_point(i, label(i));
  }
  void add_point(int i, int64_t c) {
    const bool in_doubles = wide(c);
    for (int d = 0; d < D; d++) residual[d] = double(as(X)[d * S * W + i]) - (in_doubles ? numbers_wide(c)[d] : double(numbers(c)[d]));
    Kind::moments_of_point(residual, weight(i), D, group.moments + c * sums);
  }
  // The points of each component one after the other; exponents are not needed any more.
  void sorted() {
    F* weights = as(E);
    const Index<F>* places = (const Index<F>*)R;
    std::memset(ends, 0, (K + 1) * sizeof(int));
    for (int i = 0; i < n; i++) if (std::isfinite(as(L)[i])) ends[places[i] + 1]++;
    for (int k = 0; k < K; k++) ends[k + 1] += ends[k];
    for (int i = 0; i < n; i++) if (std::isfinite(as(L)[i])) {
      const int at = ends[places[i]]++;
      index[at] = i, weights[at] = F(weight(i));
    }
    for (int k = 0, first = 0; k < K; first = ends[k++]) {
      const int64_t c = component(k);
      if (wide(c)) {
        for (int at = first; at < ends[k]; at++) add_point(int(index[at]), c);
        continue;
      }
      if (first == ends[k]) continue;
      // Numbers of points are exact.
      double *out = group.moments + c * sums, mass = out[sums - 1];
      for (int at = first; at < ends[k]; at++) mass += weight(int(index[at]));
      Kind::moments_of_rows(numbers(c), D, Rows<F>{P, weights + first, index + first, ends[k] - first, width, spaceP}, out);
      out[sums - 1] = mass;
    }
  }

  // The gradient of the weighted sum of log-sum-exps in the points.
  void gradient() {
    V* pull = Z;  // coordinate d of vector v at d * S + v
    for (int d = 0; d < D; d++) for (int v = 0; v < vectors; v++) pull[d * S + v] = V{};
    if constexpr (DS > 0) pulls_few(pull);
    else pulls_many(pull);
    // Factors are scaled by sqrt(log2(e) / 2), so that U y here is the gradient times log2(e) / 2.
    // The unit of the weights may be beyond the range of F.
    const double scale = -2 * LN2 * call.unit, first = call.unit == 1 ? scale : 1;
    F* by = as(R);
    for (int i = 0; i < n; i++) by[i] = F(first * weight(i));
    for (int d = 0; d < D; d++) for (int v = 0; v < vectors; v++) pull[d * S + v] *= R[v];
    const F* values = as(pull);
    if (call.double_points) leave((double*)call.gradient + row * D, values, scale / first);
    else leave((float*)call.gradient + row * D, values, scale / first);
  }
  // Coordinates of vectors times a scale as rows of numbers.
  template <class T> void leave(T* out, const F* values, double scale) {
    const int dimensions = DS > 0 ? DS : D;
    if (scale == 1)
      for (int i = 0; i < n; i++) for (int d = 0; d < dimensions; d++) out[i * dimensions + d] = T(values[d * S * W + i]);
    else
      for (int i = 0; i < n; i++) for (int d = 0; d < dimensions; d++) out[i * dimensions + d] = T(scale * double(values[d * S * W + i]));
  }
  // In up to four dimensions the sums over all components stay in registers.
  void pulls_few(V* pull) {
    for (int w = 0; w < blocks; w++) {
      const V* e = exponents_at(w, 0);
      V sums[DS > 0 ? DS * N : 1];
      UNROLL for (int i = 0; i < DS * N; i++) sums[i] = V{};
      for (int k = 0; k < K; k++, e += N) {
        const int64_t c = component(k);
        V r[N];
        UNROLL for (int b = 0; b < N; b++) r[b] = e[b] * G[w * N + b];
        if (wide(c)) { pull_wide(w, c, r, pull); continue; }
        V q[N], y[DS > 0 ? DS * N : 1], out[DS > 0 ? DS * N : 1];
        Kind::template exponents<F, N, DS>(numbers(c), D, X + w * N, S, q, y);
        Kind::template pull<F, N, DS>(numbers(c), D, y, out);
        UNROLL for (int d = 0; d < DS; d++) UNROLL for (int b = 0; b < N; b++) sums[d * N + b] = fma(r[b], out[d * N + b], sums[d * N + b]);
      }
      UNROLL for (int d = 0; d < DS; d++) UNROLL for (int b = 0; b < N; b++) pull[d * S + w * N + b] += sums[d * N + b];
    }
  }
  void pulls_many(V* pull) {
    for (int k = 0; k < K; k++) {
      const int64_t c = component(k);
      for (int w = 0; w < blocks; w++) {
        const V* e = exponents_at(w, k);
        const uint16_t* m = mask + int64_t(k) * S + w * N;
        unsigned any = 0;
        for (int b = 0; b < N; b++) any |= m[b];
        if (!any) continue;
        V r[N];
        for (int b = 0; b < N; b++) r[b] = m[b] ? e[b] * G[w * N + b] : V{};
        if (wide(c)) { pull_wide(w, c, r, pull); continue; }
        V q[N];
        V *y = space, *out = space + D * N;
        Kind::template exponents<F, N, DS>(numbers(c), D, X + w * N, S, q, y);
        Kind::template pull<F, N, DS>(numbers(c), D, y, out);
        for (int d = 0; d < D; d++) UNROLL for (int b = 0; b < N; b++) pull[d * S + w * N + b] = fma(r[b], out[d * N + b], pull[d * S + w * N + b]);
      }
    }
  }
  __attribute__((noinline)) void pull_wide(int w, int64_t c, const V* r, V* pull) {
    if constexpr (mixed)
      for (int part = 0; part < PER; part++) {
        VD q[N];
        VD *y = spaceD, *out = spaceD + D * N;
        Kind::template exponents<double, N, DS>(numbers_wide(c), D, XD + (int64_t(w) * PER + part) * N, S * PER, q, y);
        Kind::template pull<double, N, DS>(numbers_wide(c), D, y, out);
        for (int d = 0; d < D; d++) for (int i = 0; i < N * WD; i++) {
          F* at = as(pull) + (d * S + w * N) * W + part * N * WD + i;
          *at += F(double(((const F*)r)[part * N * WD + i]) * ((const double*)(out + d * N))[i]);
        }
      }
  }
};

}  // namespace KERNELS
