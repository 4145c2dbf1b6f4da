// CUDA C++ for a plain C++ compiler: the names of csrc/cuda/device.cuh and of the language, so that
// a test can include a .cu file and run its kernels without a GPU.
//
// A grid runs block by block. The threads of a block are fibres (ucontext) of one operating-system
// thread: each runs until it must wait for others (a barrier, a shuffle, tensor cores) or ends.
// What a GPU would do in any order is done in each of three (`schedule`), shared memory starts as
// NaN, and an asynchronous copy arrives no sooner than it must: a missing barrier or wait gives
// wrong results in one of them. Compiled with -fsanitize=thread each fibre counts as a thread, and
// only barriers order them: a race on shared or global memory is reported even where the results
// are right.
#pragma once
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "cuda/kernels.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace dlkernels::cuda {

// ---- fibres -----------------------------------------------------------------------------------

enum class Schedule { kForward, kBackward, kShuffled };
inline Schedule schedule = Schedule::kForward;

// Between its begin and end ThreadSanitizer looks away: what fibres and their scheduler share.
struct Unwatched {
  Unwatched() {
#ifdef __SANITIZE_THREAD__
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
  }
  ~Unwatched() {
#ifdef __SANITIZE_THREAD__
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
#endif
  }
};

// What has happened before a release is seen after the next acquire.
inline void release([[maybe_unused]] void* what) {
#ifdef __SANITIZE_THREAD__
  __tsan_release(what);
#endif
}
inline void acquire([[maybe_unused]] void* what) {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(what);
#endif
}

class Block {
 public:
  static Block& get() {
    static Block block;
    return block;
  }

  [[noreturn]] static void fail(const char* what) {
    std::fprintf(stderr, "cuda_on_cpu: %s\n", what);
    std::abort();
  }

  void run(const std::function<void()>& thread, int threads, int shared) {
    thread_ = &thread;
    threads_ = threads;
    // NaN in every type, up to the last byte: an access behind it meets a page that can't be
    // touched.
    shared_ = shared_end() - (shared + 127) / 128 * 128;
    std::memset(shared_, 0xff, shared_end() - shared_);
    while (static_cast<int>(fibres_.size()) < threads) fibres_.push_back(std::make_unique<Fibre>());
    for (int i = 0; i < threads; ++i) start(*fibres_[i]);
    release(&begun_);
    {
      const Unwatched unwatched;
      schedule_threads();
    }
    acquire(&ended_);
  }

  unsigned char* shared() const { return shared_; }
  int lane() const { return current_ % 32; }

  // Until all threads of the block that have not ended are there.
  void barrier() {
    release(&barrier_);
    wait(State::kAtBarrier);
    acquire(&barrier_);
  }
  // The same for a warp.
  void warp_barrier() {
    release(&warp_barrier_[current_ / 32]);
    wait(State::kAtWarp);
    acquire(&warp_barrier_[current_ / 32]);
  }

  // What each lane of the warp hands over. Orders no memory, as on a GPU.
  template <class T>
  std::array<T, 32> exchange(const T& mine) {
    if (threads_ % 32) fail("an exchange in a warp that is not whole");
    const Unwatched unwatched;
    static_assert(sizeof(T) <= kSlot);
    // Two sets of slots: a lane may be one exchange ahead of the slowest, and no more.
    unsigned char* slots = slots_[fibre().exchanges++ % 2] + current_ / 32 * 32 * kSlot;
    std::memcpy(slots + lane() * kSlot, &mine, sizeof(T));
    wait(State::kAtWarp);
    std::array<T, 32> all;
    for (int i = 0; i < 32; ++i) std::memcpy(&all[i], slots + i * kSlot, sizeof(T));
    return all;
  }

  // Copies that are under way, in groups; the last is not ended.
  struct Copy {
    void* to;
    const void* from;
    int bytes, valid;
  };
  std::vector<std::vector<Copy>>& copies() { return fibre().copies; }

 private:
  enum class State { kReady, kAtBarrier, kAtWarp, kDone };
  static constexpr size_t kStack = 256 * 1024, kShared = 256 * 1024, kSlot = 64;

  struct Fibre {
    State state;
    ucontext_t context;
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    unsigned exchanges;
    std::vector<std::vector<Copy>> copies;
    void* fake_stack;      // AddressSanitizer's
    void* tsan = nullptr;  // ThreadSanitizer's
  };
  Fibre& fibre() {
    const Unwatched unwatched;
    return *fibres_[current_];
  }

  void schedule_threads() {
    std::vector<int> order(threads_);
    for (int i = 0; i < threads_; ++i)
      order[i] = schedule == Schedule::kBackward ? threads_ - 1 - i : i;
    do {
      if (schedule == Schedule::kShuffled) std::shuffle(order.begin(), order.end(), random_);
      for (const int i : order)
        if (fibres_[i]->state == State::kReady) {
          current_ = i;
          threadIdx = dim3(i);
          resume(*fibres_[i]);
        }
    } while (let_go());
    for (int i = 0; i < threads_; ++i)
      if (fibres_[i]->state != State::kDone)
        fail("a barrier or an exchange that not all threads meet");
  }

  // Lets those go on that have waited for each other; false if there are none.
  bool let_go() {
    bool any = false;
    const auto among = [&](int begin, int end, State state) {
      for (int i = begin; i < end; ++i)
        if (fibres_[i]->state != state && fibres_[i]->state != State::kDone) return;
      for (int i = begin; i < end; ++i)
        if (fibres_[i]->state == state) {
          fibres_[i]->state = State::kReady;
          any = true;
        }
    };
    for (int warp = 0; warp < threads_; warp += 32)
      among(warp, std::min(warp + 32, threads_), State::kAtWarp);
    if (!any) among(0, threads_, State::kAtBarrier);
    return any;
  }

  // ---- the switch from one stack to another, and what the sanitizers must be told about it

  static void body() {
    Block& block = get();
    block.arrived(nullptr);
    acquire(&block.begun_);
    (*block.thread_)();
    if (block.copies().size() > 1 || !block.copies().back().empty())
      fail("a thread that ends with copies under way");
    release(&block.ended_);
    block.wait(State::kDone);
  }

  void start(Fibre& fibre) {
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack;
    fibre.context.uc_stack.ss_size = kStack;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, body, 0);
    fibre.state = State::kReady;
    fibre.exchanges = 0;
    fibre.copies.assign(1, {});
    fibre.fake_stack = nullptr;
#ifdef __SANITIZE_THREAD__
    if (!fibre.tsan) fibre.tsan = __tsan_create_fiber(0);
#endif
  }

  void resume(Fibre& fibre) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&host_fake_, fibre.stack, kStack);
#endif
#ifdef __SANITIZE_THREAD__
    host_tsan_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(fibre.tsan, __tsan_switch_to_fiber_no_sync);
#endif
    swapcontext(&host_, &fibre.context);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(host_fake_, nullptr, nullptr);
#endif
  }

  void wait(State state) {
    const Unwatched unwatched;
    Fibre& fibre = *fibres_[current_];
    fibre.state = state;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(state == State::kDone ? nullptr : &fibre.fake_stack, host_stack_,
                                   host_size_);
#endif
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(host_tsan_, __tsan_switch_to_fiber_no_sync);
#endif
    swapcontext(&fibre.context, &host_);
    arrived(fibre.fake_stack);
  }

  void arrived([[maybe_unused]] void* fake_stack) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack, &host_stack_, &host_size_);
#endif
  }

  static unsigned char* shared_end() {
    static unsigned char* end = [] {
      void* map =
          mmap(nullptr, kShared + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      mprotect(static_cast<char*>(map) + kShared, 4096, PROT_NONE);
      return static_cast<unsigned char*>(map) + kShared;
    }();
    return end;
  }

  const std::function<void()>* thread_ = nullptr;
  int threads_ = 0, current_ = 0;
  std::vector<std::unique_ptr<Fibre>> fibres_;
  unsigned char* shared_ = nullptr;
  unsigned char slots_[2][1024 * kSlot];
  char begun_, ended_, barrier_, warp_barrier_[32];  // only their addresses count
  ucontext_t host_;
  std::mt19937 random_{0};
  void *host_fake_ = nullptr, *host_tsan_ = nullptr;
  const void* host_stack_ = nullptr;
  size_t host_size_ = 0;
};

template <class... Params, class... Args>
Error launch(void (*kernel)(Params...), dim3 grid, int block, int shared, Stream,
             const Args&... args) {
  if (grid.y > 65535 || grid.z > 65535 || block < 1 || block > 1024 || shared > 227 * 1024)
    Block::fail("a launch that CUDA would refuse");
  gridDim = grid;
  blockDim = dim3(block);
  const std::function<void()> thread = [&] { kernel(Params(args)...); };
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t b = 0; b < blocks; ++b) {
    const uint64_t i = schedule == Schedule::kBackward ? blocks - 1 - b : b;
    blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    Block::get().run(thread, block, shared);
  }
  return 0;
}

inline int multiprocessors() { return 2; }  // so few that a small test strides, too
inline int capability(int) { return 90; }
inline const char* error_string(Error) { return "none"; }
inline int version() { return 0; }
inline unsigned char* shared_memory() { return Block::get().shared(); }

// ---- types ------------------------------------------------------------------------------------

using half = _Float16;

struct bf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(half x) { return static_cast<float>(x); }
inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
template <class T>
T from_float(float x) {
  return static_cast<T>(x);
}
template <>
inline bf16 from_float<bf16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// ---- asynchronous copies ------------------------------------------------------------------------

template <int kBytes>
void copy_async(void* to_shared, const void* from, int valid) {
  const auto misaligned = [](const void* p) {
    return reinterpret_cast<uintptr_t>(p) % kBytes != 0;
  };
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if (misaligned(to_shared) || (valid > 0 && misaligned(from)) || valid < 0 || valid > kBytes)
    Block::fail("a misaligned asynchronous copy");
  Block::get().copies().back().push_back({to_shared, from, kBytes, valid});
}
inline void commit_copies() { Block::get().copies().emplace_back(); }
template <int kPending>
void wait_copies() {
  auto& groups = Block::get().copies();  // the last is still open
  const int arrived = std::max(0, static_cast<int>(groups.size()) - 1 - kPending);
  for (int i = 0; i < arrived; ++i)
    for (const auto& copy : groups[i]) {
      if (copy.valid > 0) std::memcpy(copy.to, copy.from, copy.valid);
      std::memset(static_cast<char*>(copy.to) + copy.valid, 0, copy.bytes - copy.valid);
    }
  groups.erase(groups.begin(), groups.begin() + arrived);
}

// ---- tensor cores
// ---------------------------------------------------------------------------------

template <bool kTransposed>
void load_matrices_on_cpu(uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) Block::fail("a misaligned row of a matrix");
  const int lane = Block::get().lane(), g = lane / 4, t = lane % 4;
  const auto rows = Block::get().exchange(row);
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j) {
      const int at_row = kTransposed ? 2 * t + j : g, at_col = kTransposed ? g : 2 * t + j;
      std::memcpy(reinterpret_cast<char*>(&r[i]) + 2 * j,
                  static_cast<const char*>(rows[8 * i + at_row]) + 2 * at_col, 2);
    }
}
inline void load_matrices(uint32_t (&r)[4], const void* row) {
  load_matrices_on_cpu<false>(r, row);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  load_matrices_on_cpu<true>(r, row);
}

template <class T, int K>
void multiply_add_on_cpu(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    T a[16 / sizeof(T)], b[8 / sizeof(T)];
  } mine;
  constexpr int kPer = 4 / sizeof(T);  // elements a register
  std::memcpy(mine.a, a, 16);
  std::memcpy(mine.b, b, 8);
  const int lane = Block::get().lane(), g = lane / 4, t = lane % 4;
  const auto of = Block::get().exchange(mine);
  double sums[4] = {c[0], c[1], c[2], c[3]};
  for (int k = 0; k < K; ++k) {
    const int kt = k / kPer % 4, half_of_k = k / (4 * kPer), j = k % kPer;
    const Operands& upper = of[4 * g + kt];
    for (int i = 0; i < 4; ++i) {
      const float x = to_float(upper.a[(i / 2 + 2 * half_of_k) * kPer + j]);
      const float y = to_float(of[4 * (2 * t + i % 2) + kt].b[half_of_k * kPer + j]);
      sums[i] += static_cast<double>(x) * y;
    }
  }
  for (int i = 0; i < 4; ++i) {  // rounded toward zero, as tensor cores do
    c[i] = static_cast<float>(sums[i]);
    if (std::fabs(c[i]) > std::fabs(sums[i])) c[i] = std::nextafter(c[i], 0.0f);
  }
}

template <class T>
void multiply_add_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_add_on_cpu<T, 16>(c, a, b);
}

inline uint32_t to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return std::isfinite(x) ? (bits + 0x1000) & ~0x1fffu : bits;
}
inline void multiply_add_16x8x8_tf32(float (&c)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
  // The tensor cores read no more than TF32 keeps.
  uint32_t at[4], bt[2];
  for (int i = 0; i < 4; ++i) at[i] = a[i] & ~0x1fffu;
  for (int i = 0; i < 2; ++i) bt[i] = b[i] & ~0x1fffu;
  multiply_add_on_cpu<float, 8>(c, at, bt);
}

}  // namespace dlkernels::cuda

// ---- the language's own functions
// -----------------------------------------------------------------

inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }

inline void __syncthreads() { dlkernels::cuda::Block::get().barrier(); }
inline void __syncwarp(unsigned = 0xffffffffu) { dlkernels::cuda::Block::get().warp_barrier(); }

template <class T>
T __shfl_sync(unsigned, T x, int from) {
  return dlkernels::cuda::Block::get().exchange(x)[from % 32];
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  auto& block = dlkernels::cuda::Block::get();
  return block.exchange(x)[block.lane() ^ mask];
}
template <class T>
T __shfl_down_sync(unsigned, T x, int by) {
  auto& block = dlkernels::cuda::Block::get();
  const int lane = block.lane();
  return block.exchange(x)[lane + by < 32 ? lane + by : lane];
}
inline unsigned __ballot_sync(unsigned, bool x) {
  unsigned all = 0, bit = 1;
  for (const bool lane : dlkernels::cuda::Block::get().exchange(x)) {
    all |= lane ? bit : 0;
    bit <<= 1;
  }
  return all;
}
inline bool __any_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) != 0; }

template <class T>
T atomicAdd(T* p, T x) {
  return __atomic_fetch_add(p, x, __ATOMIC_RELAXED);
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
using std::max;
using std::min;
