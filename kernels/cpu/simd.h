// What the CPU operators share: how a function is compiled for every instruction set, and how bfloat16 becomes fp32.
#pragma once

#include <bit>
#include <cstdint>

#define INLINE inline __attribute__((always_inline))

// FOR_EVERY_ISA: one function body compiled for AVX-512, AVX2 and the baseline; the loader takes the best that the machine
// has. DISPATCH: the same for a template of the vector width in floats: `name(task)` calls `body<16, 8 or 4>(task)`.
#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define FOR_EVERY_ISA __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define DISPATCH(name, body, Task)                                                         \
  __attribute__((target("arch=x86-64-v4"))) void name(const Task& task) { body<16>(task); } \
  __attribute__((target("arch=x86-64-v3"))) void name(const Task& task) { body<8>(task); }  \
  __attribute__((target("default"))) void name(const Task& task) { body<4>(task); }
#else
#define FOR_EVERY_ISA
#define DISPATCH(name, body, Task) \
  void name(const Task& task) { body<4>(task); }
#endif

namespace pixart_fast {

INLINE float widen(float value) { return value; }
INLINE float widen(uint16_t bf16) { return std::bit_cast<float>(static_cast<uint32_t>(bf16) << 16); }

// To the nearest, ties to even.
INLINE void narrow(float value, float& result) { result = value; }
INLINE void narrow(float value, uint16_t& bf16) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  bf16 = static_cast<uint16_t>(value == value ? nearest_even : 0x7fc0);
}

}  // namespace pixart_fast
