// Consecutive EM steps, plain or accelerated.
#pragma once
#include <cmath>
#include <memory>

#include "interface.hpp"
#include "squarem.hpp"
#include "steps.hpp"

namespace steps {

// Whether the last step before step ``done`` decreased the objective by less than the tolerance.
inline bool settled(const StepCall& call, int64_t done) {
  if (done < 2) return false;
  const double now = objective(call, done - 1);
  return objective(call, done - 2) - now < call.tolerance + call.relative * std::abs(now);
}

// ``ended`` becomes true if all steps were ordinary ones. If the sums of an E-step are given, there is one step. Steps before
// ``first`` have been performed by an earlier call.
template <class Evaluate> Status run(StepCall& call, const Kernel& kernel, Evaluate evaluate, bool* ended = nullptr, bool given = false, int64_t first = 0) {
  std::unique_ptr<Steps> plain;
  std::unique_ptr<Squarem> accelerated;
  if (call.accelerated) accelerated.reset(new Squarem(call, kernel));
  else plain.reset(new Steps(call, kernel, given));
  for (call.done = first; call.done < call.steps; call.done++) {
    bool ordinary = false;
    const Status status = plain ? plain->perform(call.done, evaluate, ordinary) : accelerated->perform(call.done, evaluate, ordinary);
    if (status != DONE) return status;
    if (!ordinary) break;
    if (settled(call, call.done + 1)) {
      call.done++;
      if (ended) *ended = true;
      return DONE;
    }
  }
  if (ended) *ended = call.done == call.steps;
  return DONE;
}

}  // namespace steps
