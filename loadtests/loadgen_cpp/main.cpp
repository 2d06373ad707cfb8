// Asks one HTTP/1.1 server the same thing, many times, at native speed.  ../loadgen.py builds and starts this; its
// docstring says what is measured.  One process, one thread, one epoll; the last line of stdout is JSON.

#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

namespace {

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

struct Options {
  int port = 0;
  std::string request;  // all bytes of one
  size_t connections = 1, slow = 0;
  double seconds = 1, rate = 0, aborts = 0;
};

constexpr double kSlowPause = 0.02;
constexpr size_t kSlowBytes = 512;
constexpr double kDrain = 30;  // after the last request was sent, for its answer

struct Conn {
  int fd = -1;
  bool slow = false, busy = false, measured = false;
  double began = 0, last = 0, look = 0;  // `look`: when a slow reader reads again
  size_t sent = 0, events = 0;
  long abort_after = -1;  // events; -1: never
  // the answer: head, then a body by length or in chunks
  std::string head;
  bool in_body = false, chunked = false, stream = false, newline = false;
  long left = 0;      // bytes of the body, or of the chunk
  int chunk_state = 0;  // 0 size line, 1 data, 2 CRLF behind data, 3 CRLF behind the last
  std::string line;
};

class Generator {
 public:
  explicit Generator(Options options) : options_(std::move(options)), dice_(7) {
    epoll_ = epoll_create1(0);
    conns_.resize(options_.connections);
    for (size_t i = 0; i < conns_.size(); ++i) {
      conns_[i] = std::make_unique<Conn>();
      conns_[i]->slow = i < options_.slow;
      dial(*conns_[i]);
    }
  }

  int run() {
    double began = now(), end = began + options_.seconds, due = began;
    if (options_.rate == 0)
      for (auto& conn : conns_) ask(*conn, now());
    epoll_event events[256];
    for (;;) {
      double at = now();
      sending_ = at < end;
      if (!sending_ && (busy_ == 0 || at > end + kDrain)) break;
      while (options_.rate > 0 && sending_ && due <= at) {
        ask(idle(), due);
        due += std::exponential_distribution<double>(options_.rate)(dice_);
      }
      double next = sending_ ? end : end + kDrain;
      if (options_.rate > 0 && sending_) next = std::min(next, due);
      for (size_t i = 0; i < options_.slow; ++i) {  // they stand in front
        Conn& conn = *conns_[i];
        if (conn.busy && conn.look <= at) hear(conn);
        if (conn.busy) next = std::min(next, conn.look);
      }
      timespec wait = pause(next - now());
      int n = epoll_pwait2(epoll_, events, 256, &wait, nullptr);
      for (int i = 0; i < n; ++i) {
        Conn& conn = *static_cast<Conn*>(events[i].data.ptr);
        if (events[i].events & EPOLLOUT) push(conn);
        if ((events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) && !conn.slow) hear(conn);
      }
    }
    unanswered_ = busy_;
    report(std::min(now(), end) - began);
    return 0;
  }

 private:
  static timespec pause(double seconds) {
    seconds = std::max(0.0, seconds);
    return {time_t(seconds), long(1e9 * (seconds - std::floor(seconds)))};
  }

  void dial(Conn& conn) {
    conn.fd = socket(AF_INET, SOCK_STREAM, 0);
    if (conn.slow) {
      int small = 4096;
      setsockopt(conn.fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    }
    sockaddr_in to{};
    to.sin_family = AF_INET;
    to.sin_port = htons(uint16_t(options_.port));
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (connect(conn.fd, reinterpret_cast<sockaddr*>(&to), sizeof to) != 0) {
      perror("connect");
      exit(2);
    }
    int on = 1;
    setsockopt(conn.fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    epoll_event event{};
    event.events = conn.slow ? EPOLLOUT | EPOLLET : EPOLLIN;
    event.data.ptr = &conn;
    epoll_ctl(epoll_, EPOLL_CTL_ADD, conn.fd, &event);
  }

  Conn& idle() {
    for (size_t i = 0; i < conns_.size(); ++i, turn_ = (turn_ + 1) % conns_.size())
      if (!conns_[turn_]->busy) return *conns_[turn_];
    conns_.push_back(std::make_unique<Conn>());
    dial(*conns_.back());
    turn_ = conns_.size() - 1;
    return *conns_.back();
  }

  void ask(Conn& conn, double due) {
    conn.busy = true;
    conn.measured = !conn.slow;
    conn.began = due;
    conn.last = 0;
    conn.look = now() + kSlowPause;
    conn.sent = conn.events = 0;
    conn.head.clear();
    conn.line.clear();
    conn.in_body = conn.chunked = conn.stream = conn.newline = false;
    conn.chunk_state = 0;
    conn.abort_after = std::uniform_real_distribution<>(0, 1)(dice_) < options_.aborts ? long(dice_() % 8) : -1;
    ++busy_;
    ++requests_;
    push(conn);
    if (conn.busy && conn.abort_after == 0) leave(conn);
  }

  void push(Conn& conn) {
    const std::string& all = options_.request;
    while (conn.busy && conn.sent < all.size()) {
      ssize_t n = send(conn.fd, all.data() + conn.sent, all.size() - conn.sent, MSG_NOSIGNAL | MSG_DONTWAIT);
      if (n < 0 && (errno == EAGAIN || errno == EINTR)) return want(conn, true);
      if (n < 0) return fail(conn, "send");
      conn.sent += size_t(n);
    }
    want(conn, false);
  }

  void want(Conn& conn, bool out) {
    if (conn.slow) return;
    epoll_event event{};
    event.events = EPOLLIN | (out ? uint32_t(EPOLLOUT) : 0u);
    event.data.ptr = &conn;
    epoll_ctl(epoll_, EPOLL_CTL_MOD, conn.fd, &event);
  }

  void hear(Conn& conn) {
    char buffer[65536];
    size_t most = conn.slow ? kSlowBytes : sizeof buffer;
    conn.look = now() + kSlowPause;
    for (;;) {
      ssize_t n = recv(conn.fd, buffer, most, MSG_DONTWAIT);
      if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
      if (n <= 0) {
        if (conn.busy) return fail(conn, "closed");
        close(conn.fd);
        return dial(conn);  // an idle connection ran out
      }
      if (!conn.busy) return fail(conn, "unasked");
      read(conn, buffer, size_t(n));
      if (!conn.busy || conn.slow || size_t(n) < most) return;
    }
  }

  void read(Conn& conn, const char* data, size_t size) {
    double at = now();
    size_t before = conn.events;
    bool done = false;
    if (!conn.in_body) {
      size_t old = conn.head.size();
      conn.head.append(data, size);
      size_t end = conn.head.find("\r\n\r\n", old < 3 ? 0 : old - 3);
      if (end == std::string::npos) return;
      size_t used = end + 4 - old;
      for (char& c : conn.head) c = char(c >= 'A' && c <= 'Z' ? c + 32 : c);
      if (conn.head.compare(9, 3, "200") != 0) {
        if (first_error_.empty()) first_error_ = conn.head.substr(0, 12);
        ++errors_;
        conn.measured = false;
      }
      conn.in_body = true;
      conn.chunked = conn.head.find("\r\ntransfer-encoding: chunked") < end;
      conn.stream = conn.head.find("\r\ncontent-type: text/event-stream") < end;
      size_t length = conn.head.find("\r\ncontent-length:");
      conn.left = length < end ? atol(conn.head.c_str() + length + 17) : 0;
      data += used;
      size -= used;
      if (!conn.chunked && conn.left == 0) done = true;
    }
    if (size > 0 || done) {
      bool first = conn.last == 0 && size > 0;
      double gap = at - conn.last;
      done = (conn.chunked ? chunks(conn, data, size) : length(conn, data, size)) || done;
      if (conn.measured && first) ttfb_.push_back(float(at - conn.began));
      if (conn.measured && !first && conn.stream && conn.events > before && !done) gaps_.push_back(float(gap));
      if (size > 0) conn.last = at;
    }
    if (done) return finish(conn);
    if (conn.abort_after >= 0 && conn.events >= size_t(conn.abort_after)) leave(conn);
  }

  bool length(Conn& conn, const char* data, size_t size) {
    count(conn, data, size);
    conn.left -= long(size);
    return conn.left <= 0;
  }

  bool chunks(Conn& conn, const char* data, size_t size) {
    for (size_t i = 0; i < size;) {
      if (conn.chunk_state == 1) {
        size_t take = std::min(size - i, size_t(conn.left));
        count(conn, data + i, take);
        conn.left -= long(take);
        i += take;
        if (conn.left == 0) conn.chunk_state = 2;
        continue;
      }
      char c = data[i++];
      if (c != '\n') {
        conn.line += c;
        continue;
      }
      if (conn.chunk_state == 2) conn.chunk_state = 0;
      else if (conn.chunk_state == 3) return true;
      else conn.left = strtol(conn.line.c_str(), nullptr, 16), conn.chunk_state = conn.left ? 1 : 3;
      conn.line.clear();
    }
    return false;
  }

  void count(Conn& conn, const char* data, size_t size) {
    bytes_ += size;
    if (!conn.stream) return;
    for (size_t i = 0; i < size; ++i) {
      bool newline = data[i] == '\n';
      if (newline && conn.newline) ++conn.events, ++events_;
      conn.newline = newline && !conn.newline;
    }
  }

  void finish(Conn& conn) {
    if (conn.measured) whole_.push_back(float(now() - conn.began));
    ++answered_;
    free(conn);
  }

  void leave(Conn& conn) {
    ++aborted_;
    conn.measured = false;
    close(conn.fd);
    dial(conn);
    free(conn);
  }

  void fail(Conn& conn, const char* what) {
    ++errors_;
    if (first_error_.empty()) first_error_ = what;
    close(conn.fd);
    dial(conn);
    if (conn.busy) free(conn);
  }

  void free(Conn& conn) {
    conn.busy = false;
    --busy_;
    if (options_.rate == 0 && sending_) ask(conn, now());
  }

  static double percentile(std::vector<float>& all, double share) {
    if (all.empty()) return 0;
    auto at = all.begin() + long(share * double(all.size() - 1));
    std::nth_element(all.begin(), at, all.end());
    return 1e3 * double(*at);
  }

  void report(double seconds) {
    rusage used;
    getrusage(RUSAGE_SELF, &used);
    double cpu = double(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
                 1e-6 * double(used.ru_utime.tv_usec + used.ru_stime.tv_usec);
    printf(
        "{\"requests\":%zu,\"answered\":%zu,\"aborted\":%zu,\"unanswered\":%zu,\"errors\":%zu,\"error\":\"%s\","
        "\"events\":%zu,\"bytes\":%zu,\"seconds\":%.4f,\"cpu\":%.4f,\"ttfb_p50\":%.4f,\"ttfb_p99\":%.4f,"
        "\"whole_p50\":%.4f,\"gap_p50\":%.4f,\"gap_p99\":%.4f}\n",
        requests_, answered_, aborted_, unanswered_, errors_, first_error_.c_str(), events_, bytes_, seconds, cpu,
        percentile(ttfb_, .5), percentile(ttfb_, .99), percentile(whole_, .5), percentile(gaps_, .5),
        percentile(gaps_, .99));
  }

  Options options_;
  std::mt19937 dice_;
  std::vector<std::unique_ptr<Conn>> conns_;
  std::vector<float> ttfb_, whole_, gaps_;
  std::string first_error_;
  size_t requests_ = 0, answered_ = 0, aborted_ = 0, unanswered_ = 0, errors_ = 0, events_ = 0, bytes_ = 0;
  size_t busy_ = 0, turn_ = 0;
  bool sending_ = true;
  int epoll_ = -1;
};

}  // namespace

int main(int count, char** args) {
  Options options;
  for (int i = 1; i + 1 < count; i += 2) {
    std::string name = args[i], value = args[i + 1];
    if (name == "--port") options.port = atoi(value.c_str());
    else if (name == "--connections") options.connections = size_t(atol(value.c_str()));
    else if (name == "--slow") options.slow = size_t(atol(value.c_str()));
    else if (name == "--seconds") options.seconds = atof(value.c_str());
    else if (name == "--rate") options.rate = atof(value.c_str());
    else if (name == "--aborts") options.aborts = atof(value.c_str());
    else if (name == "--request") {
      std::stringstream text;
      text << std::ifstream(value, std::ios::binary).rdbuf();
      options.request = text.str();
    } else return fprintf(stderr, "unknown option %s\n", name.c_str()), 2;
  }
  signal(SIGPIPE, SIG_IGN);
  return Generator(options).run();
}
