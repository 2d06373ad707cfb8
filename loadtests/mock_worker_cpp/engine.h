// What a worker does with prompts: waits, computes what its cache does not hold, speaks.  No sockets here.
#pragma once

#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <queue>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "keys.h"

inline double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

struct Pace {
  double prefill_rate = 8000, decode_rate = 100;  // tokens/s of one worker; tokens/s of one stream
  size_t chunk_tokens = 32, capacity = 2000;      // chunks
};

struct Conn;
struct Worker;

struct Request {
  Conn* conn = nullptr;  // null: hung up, or answered
  Worker* worker = nullptr;
  std::vector<Key> keys;
  size_t tokens = 0, cached = 0, asked = 16, said = 0;
  bool chat = false, stream = false, usage = false;
  double arrived = 0;
  std::string text;  // of an answer that is not streamed
};
using Held = std::shared_ptr<Request>;

// Least recently used chunks.  A prompt is touched from its end to its beginning, so a chunk is never younger
// than what stands before it, and what falls out is always the end of a prefix.
class Cache {
 public:
  size_t prefix(const std::vector<Key>& keys) const {
    size_t n = 0;
    while (n < keys.size() && where_.count(keys[n])) ++n;
    return n;
  }
  struct Change {
    Key root{};
    std::vector<Key> gained;
    std::vector<std::pair<Key, Key>> lost;  // chunk, first chunk of its prompt
  };

  Change put(const std::vector<Key>& keys, size_t capacity) {
    Change change;
    if (keys.empty()) return change;
    change.root = keys[0];
    for (size_t i = std::min(keys.size(), capacity); i-- > 0;) {
      auto found = where_.find(keys[i]);
      if (found != where_.end()) {
        order_.splice(order_.begin(), order_, found->second);
        continue;
      }
      order_.push_front({keys[i], keys[0]});
      where_[keys[i]] = order_.begin();
      change.gained.push_back(keys[i]);
    }
    std::reverse(change.gained.begin(), change.gained.end());  // parents first
    for (; where_.size() > capacity; order_.pop_back()) {
      change.lost.push_back(order_.back());
      where_.erase(order_.back().first);
    }
    return change;
  }

 private:
  std::list<std::pair<Key, Key>> order_;  // chunk, first chunk of its prompt
  std::unordered_map<Key, std::list<std::pair<Key, Key>>::iterator, KeyHash> where_;
};

struct Worker {
  int number = 0;
  Cache cache;
  std::deque<Held> waiting;
  Held computing;
  size_t running = 0, running_tokens = 0, queued_tokens = 0;
  size_t requests = 0, finished = 0, aborted = 0, prompt_tokens = 0, cached_tokens = 0;
};

// Due times follow from due times, never from when somebody got around to them: a late process does not make the
// emulated worker slower.
class Engine {
 public:
  using Speak = std::function<void(const Held&, double due)>;

  Engine(Pace pace, Speak speak) : pace_(pace), speak_(std::move(speak)) {}

  double next() const { return timers_.empty() ? now() + 1 : timers_.top().due; }

  void fire() {
    while (!timers_.empty() && timers_.top().due <= now()) {
      Timer timer = timers_.top();
      timers_.pop();
      Worker& worker = *timer.request->worker;
      if (worker.computing == timer.request) computed(worker, timer.due);
      if (timer.request->conn) speak_(timer.request, timer.due);
    }
  }

  void enqueue(const Held& request) {
    Worker& worker = *request->worker;
    worker.requests++;
    worker.prompt_tokens += request->tokens;
    worker.queued_tokens += request->tokens;
    worker.waiting.push_back(request);
    begin_next(worker, request->arrived);
  }

  void next_token(const Held& request, double said) { at(said + 1 / pace_.decode_rate, request); }

  // Answered, or its client left: then what it was waiting for goes to the next.
  void leave(const Held& request) {
    Worker& worker = *request->worker;
    request->conn = nullptr;
    if (worker.computing == request) {
      worker.computing = nullptr;
      worker.queued_tokens -= request->tokens - request->cached;
      return begin_next(worker, now());
    }
    auto found = std::find(worker.waiting.begin(), worker.waiting.end(), request);
    if (found != worker.waiting.end()) {
      worker.waiting.erase(found);
      worker.queued_tokens -= request->tokens;
      return;
    }
    worker.running--;
    worker.running_tokens -= request->tokens;
  }

 private:
  struct Timer {
    double due;
    uint64_t order;  // first set, first served
    Held request;
    bool operator<(const Timer& other) const { return due != other.due ? due > other.due : order > other.order; }
  };

  void at(double due, const Held& request) { timers_.push({due, timer_++, request}); }

  // Serial prefill.  A prompt looks into the cache when its turn comes, as an engine schedules it.
  void begin_next(Worker& worker, double when) {
    if (worker.computing || worker.waiting.empty()) return;
    Held next = worker.waiting.front();
    worker.waiting.pop_front();
    size_t hit = worker.cache.prefix(next->keys) * pace_.chunk_tokens;
    while (hit && hit >= next->tokens) hit -= pace_.chunk_tokens;  // one token is computed, for its logits
    next->cached = hit;
    worker.cached_tokens += hit;
    worker.queued_tokens -= hit;
    worker.computing = next;
    at(when + double(next->tokens - hit) / pace_.prefill_rate, next);
  }

  void computed(Worker& worker, double when) {
    Held done = std::move(worker.computing);
    worker.computing = nullptr;
    worker.queued_tokens -= done->tokens - done->cached;
    worker.running++;
    worker.running_tokens += done->tokens;
    tell(worker, worker.cache.put(done->keys, pace_.capacity));
    begin_next(worker, when);
  }

  static void tell(const Worker& worker, const Cache::Change& change) {
    std::string news, number = std::to_string(worker.number);
    if (!change.gained.empty()) {
      news = number + " + " + hex(change.root);
      for (const Key& key : change.gained) news += " " + hex(key);
      news += "\n";
    }
    for (const auto& [key, root] : change.lost) news += number + " - " + hex(root) + " " + hex(key) + "\n";
    for (size_t done = 0; done < news.size();) {
      ssize_t n = write(STDOUT_FILENO, news.data() + done, news.size() - done);
      if (n <= 0) exit(0);  // nobody listens any more
      done += size_t(n);
    }
  }

  Pace pace_;
  Speak speak_;
  std::priority_queue<Timer> timers_;
  uint64_t timer_ = 0;
};
