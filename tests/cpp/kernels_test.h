// Torch-free tests of the kernel tables: run on every table this machine supports, with every
// buffer against a guard page, first at its end and then at its start, and the parts of a call on
// threads of their own.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "cpu/kernels.h"

namespace dlkernels::test {

inline bool guard_at_end = true;  // which side of a buffer touches inaccessible memory

// n values of T between two inaccessible pages, touching one of them.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : size_(n) {
    const size_t page = sysconf(_SC_PAGESIZE), bytes = n * sizeof(T);
    length_ = (bytes + page - 1) / page * page + 2 * page;
    void* map = mmap(nullptr, length_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    base_ = static_cast<char*>(map);
    mprotect(base_ + page, length_ - 2 * page, PROT_READ | PROT_WRITE);
    data_ = reinterpret_cast<T*>(guard_at_end ? base_ + length_ - page - bytes : base_ + page);
  }
  // Numbers in [-1, 1) that repeat on every run.
  Buffer(int64_t n, uint32_t seed) : Buffer(n) {
    for (int64_t i = 0; i < n; ++i) {
      seed = seed * 1664525u + 1013904223u;
      data_[i] = static_cast<T>(static_cast<int32_t>(seed) * 0x1p-31);
    }
  }
  ~Buffer() { munmap(base_, length_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  int64_t size() const { return size_; }
  void fill(T value) {
    for (int64_t i = 0; i < size_; ++i) data_[i] = value;
  }

 private:
  int64_t size_;
  size_t length_;
  char* base_;
  T* data_;
};

// A test returns the number of wrong results; a static Test registers it.
struct Test {
  using Run = int (*)(const cpu::Kernels&);
  Test(const char* name, Run run) { all().push_back({name, run}); }

  struct Entry {
    const char* name;
    Run run;
  };
  static std::vector<Entry>& all() {
    static std::vector<Entry> tests;
    return tests;
  }
};

inline int random_cases = 30;  // of each random test, for each table
inline uint32_t random_seed = 1;

// Numbers that repeat on every run.
struct Random {
  uint64_t state = random_seed;
  int64_t operator()(int64_t low, int64_t high) {  // in [low, high]
    state = state * 6364136223846793005u + 1442695040888963407u;
    return low + static_cast<int64_t>((state >> 33) % static_cast<uint64_t>(high - low + 1));
  }
};

// The parts of a call: every eighth time at once, each on a thread of its own, as csrc/ops splits
// the work; else, because threads take longer than small parts, one after the other, last first.
template <class... Part>
void together(const Part&... part) {
  static int calls = 0;
  if (++calls % 8 == 0) {
    std::thread threads[] = {std::thread(part)...};
    for (std::thread& t : threads) t.join();
  } else {
    const std::function<void()> parts[] = {part...};
    for (size_t i = sizeof...(part); i-- > 0;) parts[i]();
  }
}

inline bool close(double got, double expected, double tolerance) {
  return (std::isnan(got) && std::isnan(expected)) || got == expected ||
         std::fabs(got - expected) <= tolerance;
}

}  // namespace dlkernels::test
