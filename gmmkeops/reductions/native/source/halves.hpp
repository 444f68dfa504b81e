// Float16 numbers as bits, in portable arithmetic that compilers turn into vector instructions.
//
// float64 numbers are rounded to float32 and then to float16, both to the nearest number and to even ones in the middle of two, as
// torch does. All functions have internal linkage, since they are compiled for several instruction sets.
#pragma once
#include <cmath>
#include <cstdint>

namespace {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// The nearest integer, and the even one in the middle of two, for numbers below 2^51.
inline double nearest(double value) { return (value + 0x1.8p52) - 0x1.8p52; }

// Rounds a float32 number to float16, and sets ``rounded`` to the result if it is finite.
//
// The sum of 4 |value| and a power of two that is 2^13 times larger than the last bit of the result, or than the smallest positive
// number, has the result in its last bits. The multiplications make numbers infinite that are too large.
inline uint16_t half_of(float value, float& rounded) {
  const uint32_t bits = bits_of(value), twice = bits + bits, own = twice & 0xFF000000u;
  const uint32_t exponent = own < 0x71000000u ? 0x71000000u : own;
  const float power = float_of((exponent >> 1) + 0x07800000u), sum = power + (__builtin_fabsf(value) * 0x1p112f) * 0x1p-110f;
  const uint32_t found = bits_of(sum), magnitude = ((found >> 13) & 0x7C00u) + (found & 0x0FFFu);
  rounded = float_of(bits_of((sum - power) * 0.25f) | (bits & 0x80000000u));
  return uint16_t(((bits >> 16) & 0x8000u) | (twice > 0xFF000000u ? 0x7E00u : magnitude));
}

// Splits numbers into an integer and two more digits, or rounds them to integers only, if ``second`` is null.
inline void split_into_digits(const double* values, int64_t count, uint16_t* first, uint16_t* second, uint16_t* third) {
  // Short loops would be unrolled instead of turned into vector instructions.
  constexpr int64_t BLOCK = 256;
  double rest[BLOCK];
  float single[BLOCK], rounded[BLOCK];
  for (int64_t start = 0; start < count; start += BLOCK) {
    const int n = int(count - start < BLOCK ? count - start : BLOCK);
    const double* value = values + start;
    for (int i = 0; i < n; i++) single[i] = float(nearest(value[i]));
    for (int i = 0; i < n; i++) first[start + i] = half_of(single[i], rounded[i]);
    if (!second) continue;
    for (int i = 0; i < n; i++) rest[i] = value[i] - double(rounded[i]), single[i] = float(rest[i]);
    for (int i = 0; i < n; i++) second[start + i] = half_of(single[i], rounded[i]);
    for (int i = 0; i < n; i++) single[i] = float(rest[i] - double(rounded[i]));
    for (int i = 0; i < n; i++) third[start + i] = half_of(single[i], rounded[i]);
  }
}

}  // namespace
