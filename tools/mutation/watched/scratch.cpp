// In place of csrc/common/scratch.cpp where mutants are judged: whoever writes to the red zones between the parts of
// the scratch memory is found out afterwards, and whoever goes past its end at once.
#include "common/scratch.h"

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <new>
#include <utility>

#include "watched.h"

namespace rmc {
namespace {

constexpr size_t kRoom = size_t{1} << 28, kPage = 4096;

// What a red zone holds: no address, and signaling NaN of doubles and of every other float, which are others once they
// were added to anything; another word at each place, so that to copy one to the other is found out as well.
uint32_t untouched(const uint32_t* word) {
  const auto place = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(word) >> 2);
  return (place % 2 ? 0x7ff40000 : 0x7fa00000) | (place & 0xffff);
}

std::mutex mutex;
std::map<char*, size_t> zones;
int64_t found = 0;

void check(const char* data, size_t bytes) {
  const auto* words = reinterpret_cast<const uint32_t*>(data);
  found += std::any_of(words, words + bytes / 4, [](const uint32_t& word) { return word != untouched(&word); });
}

void forget(char* data, size_t bytes) {
  auto zone = zones.upper_bound(data);
  if (zone != zones.begin() && std::prev(zone)->first + std::prev(zone)->second > data) zone--;
  while (zone != zones.end() && zone->first < data + bytes) {
    check(zone->first, zone->second);
    zone = zones.erase(zone);
  }
}

// Its end is that of the memory: the page behind it cannot be touched, nor can those before it.
struct Buffer {
  char* base = nullptr;

  void* need(size_t bytes) {
    if (bytes > kRoom) throw std::bad_alloc();
    if (!base) {
      void* mapped =
          mmap(nullptr, kRoom + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (mapped == MAP_FAILED) throw std::bad_alloc();
      base = static_cast<char*>(mapped);
      mprotect(base + kRoom, kPage, PROT_NONE);
    }
    const size_t rounded = (bytes + 63) / 64 * 64;
    char* data = base + kRoom - rounded;
    give_up_watching(base, kRoom);
    const size_t before = (kRoom - rounded) / kPage * kPage;
    mprotect(base, before, PROT_NONE);
    mprotect(base + before, kRoom - before, PROT_READ | PROT_WRITE);
    __builtin_memset(data, 0xff, bytes);
    watch(data + bytes, rounded - bytes);
    return data;
  }
};

thread_local Buffer buffers[TaskScratch::kOperands + 1];

}  // namespace

void watch(void* data, size_t bytes) {
  if (!bytes) return;
  const std::lock_guard<std::mutex> lock(mutex);
  forget(static_cast<char*>(data), bytes);
  auto* words = static_cast<uint32_t*>(data);
  for (uint32_t* word = words; word < words + bytes / 4; word++) *word = untouched(word);
  zones[static_cast<char*>(data)] = bytes;
}

void give_up_watching(void* data, size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  forget(static_cast<char*>(data), bytes);
}

int64_t touched() {
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& [data, bytes] : zones) check(data, bytes);
  zones.clear();
  return std::exchange(found, 0);
}

ScratchBlock::ScratchBlock(int kind, size_t size)
    : kind_(kind), size_(size), data_(size ? buffers[kind].need(size) : nullptr) {}
ScratchBlock::~ScratchBlock() = default;
void prefer_huge_pages(void*, size_t) {}

}  // namespace rmc
