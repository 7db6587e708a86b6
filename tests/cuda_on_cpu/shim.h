// Runs CUDA C++ device code on a CPU, one thread after another: a thread is a fibre, a barrier a
// yield. Included from the command line (g++ -x c++ -include shim.h file.cu); what it catches and
// what it cannot show: csrc/cuda/README.md.
#pragma once
#define SPECTRALX_CUDA_ON_CPU 1

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static  // one block at a time; not poisoned, unlike dynamic_shared()
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
using std::isinf, std::isnan, std::max, std::min;

struct uint3 { unsigned x = 0, y = 0, z = 0; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = void*;
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace shim {

constexpr size_t kStack = 256 * 1024, kSlot = 128, kSharedLimit = 227 * 1024;

#if defined(__x86_64__)
using Context = void*;  // a stack pointer
__attribute__((naked, noinline)) static void swap_context(Context*, Context*) {
  asm volatile(
      "push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n mov (%rsi), %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
}
inline void make_context(Context* context, char* stack, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + kStack) & ~uintptr_t(15));
  std::memset(top - 8, 0, 8 * sizeof(void*));
  top[-2] = reinterpret_cast<void*>(entry);  // popped by ret, which leaves the stack as after a call
  *context = top - 8;
}
#else
using Context = ucontext_t;
inline void swap_context(Context* from, Context* to) { swapcontext(from, to); }
inline void make_context(Context* context, char* stack, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = kStack;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}
#endif

// Threads that wait for each other: all of a block, or the lanes of one mask of one warp.
struct Meeting {
  unsigned arrived = 0, generation = 0;
  alignas(16) unsigned char slots[2][32][kSlot];  // what lanes show each other; by parity
};
struct Fibre {
  Context context;
  uint3 index;
  unsigned linear = 0;
  bool done = false;
  const unsigned* waits_for = nullptr;  // runs again once this is no longer `seen`
  unsigned seen = 0;
  const char* where = "";
};
struct State {
  std::vector<Fibre> fibres;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<std::map<unsigned, Meeting>> warps;
  Meeting barrier;
  Context scheduler;
  Fibre* current = nullptr;
  const std::function<void()>* body = nullptr;
  unsigned char* shared = nullptr;
  std::string error;
  int order = 0;  // 0: threads first to last; 1: last to first
  long launches = 0;
};
inline State state;

inline void yield() { swap_context(&state.current->context, &state.scheduler); }
[[noreturn]] inline void fail(const std::string& message) {
  if (state.error.empty()) state.error = message;
  for (;;) yield();  // the scheduler gives the block up
}
inline void wait(const unsigned& generation, const char* where) {
  Fibre& self = *state.current;
  self.waits_for = &generation;
  self.seen = generation;
  self.where = where;
  yield();
}
inline void fibre_main() {
  (*state.body)();
  state.current->done = true;
  for (;;) yield();
}

inline void run_block(unsigned threads) {
  state.fibres.resize(threads);
  while (state.stacks.size() < threads) state.stacks.emplace_back(new char[kStack]);
  state.warps.assign((threads + 31) / 32, {});
  state.barrier.arrived = 0;
  for (unsigned i = 0; i < threads; ++i) {
    Fibre& fibre = state.fibres[i];
    fibre = Fibre{};
    fibre.linear = i;
    fibre.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    make_context(&fibre.context, state.stacks[i].get(), fibre_main);
  }
  for (;;) {
    unsigned done = 0, ran = 0;
    for (unsigned n = 0; n < threads && state.error.empty(); ++n) {
      Fibre& fibre = state.fibres[state.order == 0 ? n : threads - 1 - n];
      if (fibre.done) { ++done; continue; }
      if (fibre.waits_for != nullptr && *fibre.waits_for == fibre.seen) continue;
      fibre.waits_for = nullptr;
      state.current = &fibre;
      threadIdx = fibre.index;
      swap_context(&state.scheduler, &fibre.context);
      ++ran;
    }
    if (!state.error.empty() || done == threads) return;
    if (ran > 0) continue;
    for (const Fibre& fibre : state.fibres) {
      if (fibre.done) continue;
      state.error = "divergent " + std::string(fibre.where) + ": thread " +
                    std::to_string(fibre.linear) + " waits for threads that never come";
      return;
    }
  }
}

// All lanes of `mask` show a value; returns the 32 slots, valid until the lane's next meeting.
template <typename T>
const unsigned char (*exchange(unsigned mask, const T& value, const char* where))[kSlot] {
  static_assert(sizeof(T) <= kSlot && std::is_trivially_copyable_v<T>);
  const unsigned lane = state.current->linear % 32;
  if (!(mask >> lane & 1u)) fail(std::string(where) + ": the calling lane is not in the mask");
  const auto threads = static_cast<unsigned>(state.fibres.size());
  const unsigned present = std::min(32u, threads - state.current->linear / 32 * 32);
  if (present < 32) mask &= (1u << present) - 1;
  Meeting& meeting = state.warps[state.current->linear / 32][mask];
  auto* slots = meeting.slots[meeting.generation & 1];
  std::memcpy(slots[lane], &value, sizeof(T));
  if (++meeting.arrived == static_cast<unsigned>(__builtin_popcount(mask))) {
    meeting.arrived = 0;
    ++meeting.generation;
  } else {
    wait(meeting.generation, where);
  }
  return slots;
}
template <typename T>
T shown(const unsigned char (*slots)[kSlot], unsigned lane) {
  T value;
  std::memcpy(&value, slots[lane], sizeof(T));
  return value;
}

}  // namespace shim

// Barriers, votes, shuffles.
inline void __syncthreads() {
  shim::Meeting& barrier = shim::state.barrier;
  if (++barrier.arrived == shim::state.fibres.size()) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    shim::wait(barrier.generation, "__syncthreads");
  }
}
inline void __syncwarp(unsigned mask = ~0u) { shim::exchange(mask, 0, "__syncwarp"); }
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto* slots = shim::exchange(mask, predicate, "__ballot_sync");
  const auto first = shim::state.current->linear / 32 * 32;
  unsigned votes = 0;
  for (unsigned i = 0; i < 32 && first + i < shim::state.fibres.size(); ++i)
    if (mask >> i & 1u && shim::shown<int>(slots, i)) votes |= 1u << i;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  const unsigned self = shim::state.current->linear % 32, segment = self / width * width;
  return shim::shown<T>(shim::exchange(mask, value, "__shfl_sync"), segment + lane % width);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32) {
  const int self = shim::state.current->linear % 32, other = self ^ distance;
  const auto* slots = shim::exchange(mask, value, "__shfl_xor_sync");
  return shim::shown<T>(slots, other / width == self / width ? other : self);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const unsigned self = shim::state.current->linear % 32;
  const auto* slots = shim::exchange(mask, value, "__shfl_down_sync");
  return shim::shown<T>(slots, self % width + distance < unsigned(width) ? self + distance : self);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const unsigned self = shim::state.current->linear % 32;
  const auto* slots = shim::exchange(mask, value, "__shfl_up_sync");
  return shim::shown<T>(slots, self % width >= distance ? self - distance : self);
}

// Memory: threads of a block never run at once, so an atomic is a plain update.
inline void __threadfence() {}
template <typename T> T atomicAdd(T* at, T value) { T old = *at; *at = old + value; return old; }
template <typename T> T atomicMax(T* at, T value) { T old = *at; *at = max(old, value); return old; }
template <typename T> T atomicCAS(T* at, T expected, T value) {
  T old = *at;
  if (old == expected) *at = value;
  return old;
}

// Types: vectors (their alignment is asserted by -fsanitize=alignment), half, bfloat16.
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct __half { uint16_t bits; };
struct __nv_bfloat16 { uint16_t bits; };
inline float __uint_as_float(unsigned bits) { float f; std::memcpy(&f, &bits, 4); return f; }
inline unsigned __float_as_uint(float f) { unsigned bits; std::memcpy(&bits, &f, 4); return bits; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float(unsigned(v.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16(float f) {  // round to nearest even
  const unsigned bits = __float_as_uint(f);
  if (isnan(f)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
inline float __half2float(__half v) {
  const int exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
  float f = exponent == 31 ? (fraction ? NAN : INFINITY)
            : exponent     ? std::ldexp(float(fraction + 1024), exponent - 25)
                           : std::ldexp(float(fraction), -24);
  return v.bits >> 15 ? -f : f;
}
inline __half __float2half(float f) {  // round to nearest even
  const auto sign = static_cast<uint16_t>(std::signbit(f) << 15);
  const float size = std::fabs(f);
  if (isnan(f)) return {0x7fff};
  if (size >= 65520.f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = -30;  // of a zero
  if (size > 0.f) std::frexp(size, &exponent);  // size in [2^(exponent - 1), 2^exponent)
  const int step = max(exponent - 11, -24);
  const auto steps = static_cast<int>(std::nearbyint(std::ldexp(size, -step)));
  // A half's bits count its steps: the exponent grows by one every 1024 of them.
  return {static_cast<uint16_t>(sign | (steps + ((step + 24) << 10)))};
}
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline double rsqrt(double x) { return 1. / std::sqrt(x); }

namespace spectralx::cuda {

inline unsigned char* dynamic_shared() { return shim::state.shared; }

// Runs at once. 0, or 1 after a broken launch; spectralx_shim_error() says why.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t,
           Arguments... arguments) {
  const unsigned threads = block.x * block.y * block.z;
  if (threads < 1 || threads > 1024 || grid.x * grid.y * grid.z == 0 || grid.y > 65535 ||
      grid.z > 65535 || shared > shim::kSharedLimit) {
    shim::state.error = "launch: grid, block or shared memory outside a GPU's limits";
    return 1;
  }
  const std::function<void()> body = [&] { kernel(arguments...); };
  shim::state.body = &body;
  shim::state.error.clear();
  ++shim::state.launches;
  gridDim = grid, blockDim = block;
  const unsigned blocks = grid.x * grid.y * grid.z;
  for (unsigned n = 0; n < blocks && shim::state.error.empty(); ++n) {
    const unsigned i = shim::state.order == 0 ? n : blocks - 1 - n;
    blockIdx = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
    // Exactly as large as asked for, full of NaN.
    void* memory = std::malloc(std::max<size_t>(1, shared));
    shim::state.shared = static_cast<unsigned char*>(std::memset(memory, 0xff, shared));
    shim::run_block(threads);
    std::free(memory);
  }
  return shim::state.error.empty() ? 0 : 1;
}

inline float widen(__half v) { return __half2float(v); }
inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

// mma.sync.m16n8k16 with float accumulation: c += a b over a warp, in the layout of the PTX manual.
template <typename T>
void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  struct Registers { unsigned a[4], b[2]; } mine;
  std::memcpy(mine.a, a, sizeof(a)), std::memcpy(mine.b, b, sizeof(b));
  const auto* slots = shim::exchange(~0u, mine, "mma");
  const unsigned lane = shim::state.current->linear % 32;
  const auto value = [&](unsigned owner, unsigned reg, unsigned k) {
    const auto word = reinterpret_cast<const unsigned*>(slots[owner])[reg];
    return widen(T{static_cast<uint16_t>(k & 1 ? word >> 16 : word)});
  };
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + (i / 2) * 8, column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      c[i] += value(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k) *
              value(column * 4 + k % 8 / 2, 4 + k / 8, k);
    }
  }
}

}  // namespace spectralx::cuda

extern "C" {
__attribute__((used)) inline const char* spectralx_shim_error() { return shim::state.error.c_str(); }
__attribute__((used)) inline void spectralx_shim_order(int order) { shim::state.order = order; }
__attribute__((used)) inline long spectralx_shim_launches() { return shim::state.launches; }
}
