// Vectors of the widest registers of an instruction set, and the functions of them that the kernels need.
//
// Everything is in a namespace of its own for each instruction set: functions of the same name, compiled for different
// instruction sets, would otherwise be merged by the linker. For the same reason kernels use no templates of the library.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINED inline __attribute__((always_inline))
#define INLINE static INLINED
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

// Keeps a number in a register. GCC otherwise repeats its load in each use, and the load ports become the bottleneck.
#if defined(__clang__) || !defined(__x86_64__)
#define KEEP(v)
#elif defined(__AVX512F__)
#define KEEP(v) asm("" : "+v"(v))
#else
#define KEEP(v) asm("" : "+x"(v))
#endif

namespace KERNELS {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX2__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

template <class F> struct Types;
template <> struct Types<float> {
  typedef float Real __attribute__((vector_size(BYTES)));
  typedef int32_t Index;
  typedef Index Integer __attribute__((vector_size(BYTES)));
};
template <> struct Types<double> {
  typedef double Real __attribute__((vector_size(BYTES)));
  typedef int64_t Index;
  typedef Index Integer __attribute__((vector_size(BYTES)));
};
template <class F> using Vector = typename Types<F>::Real;
template <class F> using Integers = typename Types<F>::Integer;
template <class F> using Index = typename Types<F>::Index;
template <class F> constexpr int LANES = BYTES / sizeof(F);

// Vectors of points that are processed together, and rows and columns of a block of second moments: their accumulators fill
// the registers.
constexpr int BLOCK = BYTES == 64 ? 4 : 2;
constexpr int ROWS = 4, COLUMNS = BYTES == 64 ? 4 : 2;

// a - 0 is a for every a, so that this is one broadcast; 0 + a would be an addition, since 0 + -0 is not -0.
template <class F> INLINE Vector<F> broadcast(F a) { return a - Vector<F>{}; }
template <class V> INLINE V maximum(V a, V b) { return a > b ? a : b; }
template <class V> INLINE V minimum(V a, V b) { return a < b ? a : b; }

// a * b + c and c - a * b, rounded once where the instruction set can.
#if defined(__AVX512F__)
INLINE Vector<float> fma(Vector<float> a, Vector<float> b, Vector<float> c) { return (Vector<float>)_mm512_fmadd_ps(a, b, c); }
INLINE Vector<double> fma(Vector<double> a, Vector<double> b, Vector<double> c) { return (Vector<double>)_mm512_fmadd_pd(a, b, c); }
INLINE Vector<float> fnma(Vector<float> a, Vector<float> b, Vector<float> c) { return (Vector<float>)_mm512_fnmadd_ps(a, b, c); }
INLINE Vector<double> fnma(Vector<double> a, Vector<double> b, Vector<double> c) { return (Vector<double>)_mm512_fnmadd_pd(a, b, c); }
#elif defined(__FMA__)
INLINE Vector<float> fma(Vector<float> a, Vector<float> b, Vector<float> c) { return (Vector<float>)_mm256_fmadd_ps(a, b, c); }
INLINE Vector<double> fma(Vector<double> a, Vector<double> b, Vector<double> c) { return (Vector<double>)_mm256_fmadd_pd(a, b, c); }
INLINE Vector<float> fnma(Vector<float> a, Vector<float> b, Vector<float> c) { return (Vector<float>)_mm256_fnmadd_ps(a, b, c); }
INLINE Vector<double> fnma(Vector<double> a, Vector<double> b, Vector<double> c) { return (Vector<double>)_mm256_fnmadd_pd(a, b, c); }
#elif defined(__aarch64__)
INLINE Vector<float> fma(Vector<float> a, Vector<float> b, Vector<float> c) { return (Vector<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
INLINE Vector<double> fma(Vector<double> a, Vector<double> b, Vector<double> c) { return (Vector<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b); }
INLINE Vector<float> fnma(Vector<float> a, Vector<float> b, Vector<float> c) { return (Vector<float>)vfmsq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
INLINE Vector<double> fnma(Vector<double> a, Vector<double> b, Vector<double> c) { return (Vector<double>)vfmsq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b); }
#else
template <class V> INLINE V fma(V a, V b, V c) { return a * b + c; }
template <class V> INLINE V fnma(V a, V b, V c) { return c - a * b; }
#endif

// One bit for each lane of a comparison.
template <class I> INLINE unsigned bits(I mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof(mask[0]) == 4) return _mm512_movepi32_mask((__m512i)mask);
  else return _mm512_movepi64_mask((__m512i)mask);
#elif defined(__AVX2__)
  if constexpr (sizeof(mask[0]) == 4) return _mm256_movemask_ps((__m256)mask);
  else return _mm256_movemask_pd((__m256d)mask);
#elif defined(__x86_64__)
  if constexpr (sizeof(mask[0]) == 4) return _mm_movemask_ps((__m128)mask);
  else return _mm_movemask_pd((__m128d)mask);
#else
  unsigned found = 0;
  for (unsigned i = 0; i < sizeof(mask) / sizeof(mask[0]); i++) found |= (mask[i] != 0) << i;
  return found;
#endif
}

// 2^x for x <= 0, and exactly zero where that is not a normal number: a clamp alone would give each point to each component
// with 2^-126, and components without points the mean of all points. Polynomials: 2^r on [-1/2, 1/2], relative errors of
// 1e-7 and 2e-16.
constexpr float EXP2_SINGLE[] = {1.0f, 0.6931471880262273f, 0.2402210748530968f, 0.05550357114222094f, 0.009676031918255982f,
                                 0.001339086336353527f};
constexpr double EXP2_DOUBLE[] = {1.0, 0.6931471805599453, 0.2402265069591007, 0.055504108664821576, 0.009618129107628477,
                                  0.0013333558146428441, 0.00015403530393381606, 1.5252733804059838e-05, 1.3215486790144305e-06,
                                  1.0178086009239696e-07, 7.054911620801121e-09, 4.44553827187081e-10, 2.5678435993488196e-11};

INLINE Vector<float> power(Vector<float> r) {
  auto p = broadcast(EXP2_SINGLE[5]);
  UNROLL for (int i = 4; i >= 0; i--) p = fma(p, r, broadcast(EXP2_SINGLE[i]));
  return p;
}
INLINE Vector<double> power(Vector<double> r) {
  auto p = broadcast(EXP2_DOUBLE[12]);
  UNROLL for (int i = 11; i >= 0; i--) p = fma(p, r, broadcast(EXP2_DOUBLE[i]));
  return p;
}
#if defined(__AVX512F__)
// The scaling instruction returns zero below the normal numbers when these are flushed, also for x = -inf.
INLINE Vector<float> exp2(Vector<float> x) {
  auto r = (Vector<float>)_mm512_reduce_ps((__m512)x, 0);
  return (Vector<float>)_mm512_scalef_ps((__m512)power(r), (__m512)(x - r));
}
INLINE Vector<double> exp2(Vector<double> x) {
  auto r = (Vector<double>)_mm512_reduce_pd((__m512d)x, 0);
  return (Vector<double>)_mm512_scalef_pd((__m512d)power(r), (__m512d)(x - r));
}
#else
// The integer part is added to the exponent of the power of the fraction. At the clamp and below, that makes the bits of one those
// of zero; above it, to numbers that are not normal and hence count as zero, too (FlushDenormals).
template <class F> INLINE Vector<F> exp2_shifted(Vector<F> x, F clamp, F magic, int mantissa) {
  x = maximum(x, broadcast(clamp));
  const Vector<F> shifted = x + magic, r = x - (shifted - magic);
  return (Vector<F>)((Integers<F>)power(r) + ((Integers<F>)shifted << mantissa));
}
INLINE Vector<float> exp2(Vector<float> x) { return exp2_shifted<float>(x, -127.0f, 12582912.0f, 23); }
INLINE Vector<double> exp2(Vector<double> x) { return exp2_shifted<double>(x, -1023.0, 6755399441055744.0, 52); }
#endif

// log2 of finite numbers that are at least one.
INLINE Vector<float> log2(Vector<float> s) {
  typedef Vector<float> V;
  typedef Integers<float> I;
  const I b = (I)s, e = (b - 0x3f3504f3) >> 23;
  const V m = (V)(b - (e << 23)), q = (m - 1.0f) / (m + 1.0f), q2 = q * q;
  V p = broadcast(2.0f / 9);
  p = fma(p, q2, broadcast(2.0f / 7));
  p = fma(p, q2, broadcast(2.0f / 5));
  p = fma(p, q2, broadcast(2.0f / 3));
  p = fma(p, q2, broadcast(2.0f));
  return __builtin_convertvector(e, V) + (p * q) * 1.44269504088896341f;
}
INLINE Vector<double> log2(Vector<double> s) {
  Vector<double> found;
  for (int i = 0; i < LANES<double>; i++) found[i] = ::log2(s[i]);
  return found;
}

// Sums of the lanes of each of several vectors: two vectors become one that holds the partial sums of both, H lanes apart.
template <class V, int H, int... L> INLINE V halved(V a, V b, std::integer_sequence<int, L...>) {
  constexpr int W = sizeof...(L), R = W / (2 * H);
  const V low = __builtin_shufflevector(a, b, ((L / H < R ? (L / H) * 2 * H : W + (L / H - R) * 2 * H) + L % H)...);
  const V high = __builtin_shufflevector(a, b, ((L / H < R ? (L / H) * 2 * H : W + (L / H - R) * 2 * H) + L % H + H)...);
  return low + high;
}
// One vector whose lane i is the sum of the lanes of t[i].
template <class F> INLINE Vector<F> sums_of(Vector<F>* t) {
  typedef Vector<F> V;
  typedef std::make_integer_sequence<int, LANES<F>> Lanes;
  constexpr int W = LANES<F>;
  if constexpr (W >= 16) UNROLL for (int i = 0; i < W / 2; i++) t[i] = halved<V, 8>(t[2 * i], t[2 * i + 1], Lanes());
  constexpr int W8 = W < 8 ? W : 8, W4 = W < 4 ? W : 4;
  if constexpr (W >= 8) UNROLL for (int i = 0; i < W8 / 2; i++) t[i] = halved<V, 4>(t[2 * i], t[2 * i + 1], Lanes());
  if constexpr (W >= 4) UNROLL for (int i = 0; i < W4 / 2; i++) t[i] = halved<V, 2>(t[2 * i], t[2 * i + 1], Lanes());
  return halved<V, 1>(t[0], t[1], Lanes());
}
// Adds the sum of the lanes of each of N vectors to the float64 numbers at place(0), ..., place(N - 1) of ``out``.
template <class F, int N, class Place> INLINE void add_sums(const Vector<F>* a, double* out, Place place) {
  constexpr int W = LANES<F>;
  UNROLL for (int g = 0; g < N; g += W) {
    Vector<F> t[W];
    UNROLL for (int i = 0; i < W; i++) t[i] = g + i < N ? a[g + i < N ? g + i : 0] : Vector<F>{};
    const Vector<F> s = sums_of<F>(t);
    UNROLL for (int i = 0; i < W; i++) if (g + i < N) out[place(g + i)] += double(s[i]);
  }
}
template <class F> INLINE F sum_of(Vector<F> a) {
  F s = a[0];
  for (int i = 1; i < LANES<F>; i++) s += a[i];
  return s;
}

// Adds the first ``count`` lanes, and up to PADDING - 1 more, to float64 numbers.
constexpr int PADDING = 8;
constexpr int64_t padded(int64_t n, int64_t unit = PADDING) { return (n + unit - 1) / unit * unit; }
template <class F> INLINE void add_lanes(double* out, Vector<F> v, int count) {
  typedef double Loose __attribute__((vector_size(BYTES), aligned(8), may_alias));
  if constexpr (sizeof(F) == 8) *(Loose*)out += v;
  else {
    typedef float Half __attribute__((vector_size(BYTES / 2)));
    Half half[2];
    std::memcpy(half, &v, BYTES);
    *(Loose*)out += __builtin_convertvector(half[0], Vector<double>);
    if (count > LANES<double>) *(Loose*)(out + LANES<double>) += __builtin_convertvector(half[1], Vector<double>);
  }
}

// The transpose of a square matrix of W vectors: each of the steps interleaves the two halves.
template <class V, int... L> INLINE void interleave(V a, V b, V* out, std::integer_sequence<int, L...>) {
  constexpr int W = sizeof...(L);
  out[0] = __builtin_shufflevector(a, b, (L / 2 + L % 2 * W)...);
  out[1] = __builtin_shufflevector(a, b, (L / 2 + W / 2 + L % 2 * W)...);
}
template <class F> INLINE void transpose(Vector<F>* t) {
  constexpr int W = LANES<F>;
  UNROLL for (int step = 1; step < W; step *= 2) {
    Vector<F> u[W];
    UNROLL for (int i = 0; i < W / 2; i++) interleave(t[i], t[i + W / 2], u + 2 * i, std::make_integer_sequence<int, W>());
    UNROLL for (int i = 0; i < W; i++) t[i] = u[i];
  }
}

// Writes the lanes of a mask one after the other, and then others.
template <class T, class V> INLINE void compress(T* out, V v, unsigned mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(mask, (__m512i)v));
  else _mm512_storeu_si512(out, _mm512_maskz_compress_epi64(mask, (__m512i)v));
#else
  for (int n = 0; mask; mask &= mask - 1) out[n++] = v[__builtin_ctz(mask)];
#endif
}

// Some points as rows of ``width`` vectors, whose last lanes are zero, and their responsibilities. The space holds as many rows
// as ROWS_AT_ONCE twice, and one more; its last lanes are zero, too.
template <class F> struct Rows {
  const Vector<F>* points;
  const F* r;
  const Index<F>* index;
  int n, width;
  Vector<F>* space;
};
constexpr int ROWS_AT_ONCE = 32;

// Denormal numbers count as zero in this thread while an object lives: arithmetic with them is 50 times slower.
struct FlushDenormals {
#if defined(__x86_64__)
  unsigned before = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(before | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before); }
#elif defined(__aarch64__)
  uint64_t before;
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before));
    asm volatile("msr fpcr, %0" ::"r"(before | (1u << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(before)); }
#endif
};

}  // namespace KERNELS
