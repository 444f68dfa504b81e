// Sums and maxima of many terms in a fixed order that compilers turn into vector instructions.
#pragma once
#include <cstdint>

namespace {

// The sum of term(0), ..., term(count - 1), computed in eight parts.
template <class Term> double sum_of(int64_t count, Term term) {
  constexpr int PARTS = 8;
  double parts[PARTS] = {};
  int64_t d = 0;
  for (; d + PARTS <= count; d += PARTS) for (int i = 0; i < PARTS; i++) parts[i] += term(d + i);
  for (int i = 0; d + i < count; i++) parts[i] += term(d + i);
  return ((parts[0] + parts[4]) + (parts[2] + parts[6])) + ((parts[1] + parts[5]) + (parts[3] + parts[7]));
}

// The largest one of term(0), ..., term(count - 1) and zero.
template <class Term> double largest_of(int64_t count, Term term) {
  constexpr int PARTS = 8;
  double parts[PARTS] = {};
  const auto raise = [&](int i, double value) { parts[i] = value > parts[i] ? value : parts[i]; };
  int64_t d = 0;
  for (; d + PARTS <= count; d += PARTS) for (int i = 0; i < PARTS; i++) raise(i, term(d + i));
  for (int i = 0; d + i < count; i++) raise(i, term(d + i));
  for (int i = 1; i < PARTS; i++) raise(0, parts[i]);
  return parts[0];
}

}  // namespace
