// A block of threads on the CPU: fibres (ucontext) of one operating-system thread, each of which
// runs until it must wait for others or ends. What a GPU would do in any order is done in each of
// three
// (`schedule`), and shared memory starts as NaN. Compiled with -fsanitize=thread each fibre counts
// as a thread, and only barriers order them: a race on shared or global memory is reported even
// where the results are right.
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

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace dlkernels::cuda {

enum class Schedule { kForward, kBackward, kShuffled };
inline Schedule schedule = Schedule::kForward;

// Between its begin and end ThreadSanitizer looks away: what fibres and their scheduler share. It
// means reads, too, and keeps a stack for each: two thirds of the time went there when they nested.
struct Unwatched {
  Unwatched() {
#ifdef __SANITIZE_THREAD__
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
  }
  ~Unwatched() {
#ifdef __SANITIZE_THREAD__
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
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
    meet(State::kAtBarrier);
    acquire(&barrier_);
  }
  // The same for a warp.
  void warp_barrier() {
    release(&warp_barrier_[current_ / 32]);
    meet(State::kAtWarp);
    acquire(&warp_barrier_[current_ / 32]);
  }

  // A barrier that says whether any of the threads was for it. The second wait is for the count's
  // sake, and orders no memory.
  bool any(bool mine) {
    const auto count = [&](int votes) {
      const Unwatched unwatched;
      return votes_ += votes;
    };
    count(mine);
    barrier();
    const bool one = count(0) > 0;
    meet(State::kAtBarrier);
    count(-mine);
    return one;
  }

  // What each lane of the warp hands over. Orders no memory, as on a GPU.
  template <class T>
  std::array<T, 32> exchange(const T& mine) {
    if (threads_ % 32) fail("an exchange in a warp that is not whole");
    const Unwatched unwatched;
    static_assert(sizeof(T) <= kSlot);
    // Two sets of slots: a lane may be one exchange ahead of the slowest, and no more.
    unsigned char* slots = slots_[fibres_[current_]->exchanges++ % 2] + current_ / 32 * 32 * kSlot;
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
  std::vector<std::vector<Copy>>& copies() {
    const Unwatched unwatched;
    return fibres_[current_]->copies;
  }

 private:
  enum class State { kReady, kAtBarrier, kAtWarp, kDone };
  static constexpr size_t kStack = 256 * 1024, kShared = 256 * 1024, kSlot = 64;

  struct Fibre {
    State state;
    ucontext_t context = {};
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    unsigned exchanges;
    std::vector<std::vector<Copy>> copies;
    void* fake_stack = nullptr;  // AddressSanitizer's
    void* tsan = nullptr;        // ThreadSanitizer's
  };

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

  // One thread of a block after the other, all of them on the stack of one fibre.
  static void body() {
    Block& block = get();
    block.arrived(nullptr);
    for (;;) {
      acquire(&block.begun_);
      (*block.thread_)();
      if (block.copies().size() > 1 || !block.copies().back().empty())
        fail("a thread that ends with copies under way");
      release(&block.ended_);
      block.meet(State::kDone);
    }
  }

  void start(Fibre& fibre) {
    fibre.state = State::kReady;
    fibre.exchanges = 0;
    fibre.copies.assign(1, {});
    if (fibre.context.uc_stack.ss_sp) return;
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack;
    fibre.context.uc_stack.ss_size = kStack;
    makecontext(&fibre.context, body, 0);
    fibre.context.uc_stack.ss_size = 0;  // or ASan's swapcontext clears its shadow at each switch
#ifdef __SANITIZE_THREAD__
    fibre.tsan = __tsan_create_fiber(0);
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

  void meet(State state) {
    const Unwatched unwatched;
    wait(state);
  }

  void wait(State state) {
    Fibre& fibre = *fibres_[current_];
    fibre.state = state;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&fibre.fake_stack, host_stack_, host_size_);
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
  int threads_ = 0, current_ = 0, votes_ = 0;
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

}  // namespace dlkernels::cuda
