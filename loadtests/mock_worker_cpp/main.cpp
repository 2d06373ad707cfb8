// Workers that compute nothing, at native speed: OpenAI's HTTP in front of an emulated prefix cache.
// ../mock_worker.py builds and starts this; its docstring says what is emulated.  One process, one thread, one
// epoll; each listening socket is a worker with a cache, a prefill queue and counters of its own.
// stdout carries what the caches gain and lose, for whoever publishes it:  <worker> <+|-> <root> <key>…

#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "engine.h"
#include "json.h"

namespace {

struct Options {
  std::vector<int> listeners;  // inherited sockets, one worker each
  Pace pace;
  std::string model = "mock", name_space, root, vocab, tokenized;
};

}  // namespace

struct Conn {
  Conn(int fd, Worker* worker) : fd(fd), worker(worker) {}
  int fd;
  Worker* worker;
  std::string in, out;
  Held request;
  bool dead = false, close_after = false, writing = false;
};

namespace {

class Mock {
 public:
  explicit Mock(Options options)
      : options_(std::move(options)),
        words_(options_.vocab),
        engine_(options_.pace, [this](const Held& request, double due) { speak(request, due); }) {
    epoll_ = epoll_create1(0);
    workers_.resize(options_.listeners.size());
    for (size_t i = 0; i < workers_.size(); ++i) {
      workers_[i].number = int(i);
      watch(options_.listeners[i], EPOLLIN, i + 1, EPOLL_CTL_ADD);
    }
  }

  void run() {
    epoll_event events[256];
    for (;;) {
      engine_.fire();
      int wait = int(std::ceil(1e3 * std::max(0.0, engine_.next() - now())));
      int n = epoll_wait(epoll_, events, 256, wait);
      for (int i = 0; i < n; ++i) {
        if (events[i].data.u64 <= workers_.size()) {
          greet(options_.listeners[events[i].data.u64 - 1], workers_[events[i].data.u64 - 1]);
          continue;
        }
        Conn* conn = reinterpret_cast<Conn*>(events[i].data.u64);
        if (events[i].events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) hear(conn);
        if (events[i].events & EPOLLOUT) flush(conn);
      }
      for (Conn* conn : graveyard_) delete conn;
      graveyard_.clear();
    }
  }

 private:
  // -- answers ------------------------------------------------------------------------------------------

  void speak(const Held& request, double due) {
    bool last = ++request->said >= request->asked;
    std::string word = " w" + std::to_string(request->said);
    if (request->stream) {
      if (request->said == 1)
        request->conn->out +=
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
            "transfer-encoding: chunked\r\n\r\n";
      std::string said = request->chat ? "\"delta\":{\"content\":\"" + word + "\"}"
                                       : "\"text\":\"" + word + "\"";
      part(request->conn, event(*request, "{\"index\":0," + said + ",\"logprobs\":null,\"finish_reason\":" +
                                              (last ? "\"length\"}" : "null}")));
      if (last && request->usage) part(request->conn, event(*request, ""));
      if (last) part(request->conn, "data: [DONE]\n\n"), request->conn->out += "0\r\n\r\n";
    } else {
      request->text += word;
      if (last) whole(*request);
    }
    Conn* conn = request->conn;
    if (last) {
      finish(request);
      request->worker->finished++;
    } else {
      engine_.next_token(request, due);
    }
    flush(conn);
    if (last && !conn->dead) parse(conn), flush(conn);  // the next request may be waiting behind this one
  }

  std::string event(const Request& request, const std::string& choice) {
    std::string text = "data: {\"id\":\"mock\",\"object\":\"";
    text += request.chat ? "chat.completion.chunk" : "text_completion";
    text += "\",\"created\":0,\"model\":\"" + options_.model + "\",\"choices\":[" + choice + "]";
    if (choice.empty()) text += ",\"usage\":" + usage(request);
    return text + "}\n\n";
  }

  static std::string usage(const Request& request) {
    return "{\"prompt_tokens\":" + std::to_string(request.tokens) + ",\"completion_tokens\":" +
           std::to_string(request.said) + ",\"total_tokens\":" + std::to_string(request.tokens + request.said) +
           ",\"prompt_tokens_details\":{\"cached_tokens\":" + std::to_string(request.cached) + "}}";
  }

  void whole(const Request& request) {
    std::string said = request.chat ? "\"message\":{\"role\":\"assistant\",\"content\":\"" + request.text + "\"}"
                                    : "\"text\":\"" + request.text + "\"";
    reply(request.conn, 200, "application/json",
          std::string("{\"id\":\"mock\",\"object\":\"") + (request.chat ? "chat.completion" : "text_completion") +
              "\",\"created\":0,\"model\":\"" + options_.model + "\",\"choices\":[{\"index\":0," + said +
              ",\"logprobs\":null,\"finish_reason\":\"length\"}],\"usage\":" + usage(request) + "}");
  }

  static void part(Conn* conn, const std::string& data) {
    char size[24];
    snprintf(size, sizeof size, "%zx\r\n", data.size());
    conn->out += size + data + "\r\n";
  }

  void reply(Conn* conn, int status, const char* kind, const std::string& body) {
    const char* word = status == 200 ? "OK" : status == 404 ? "Not Found" : "Bad Request";
    conn->out += "HTTP/1.1 " + std::to_string(status) + " " + word + "\r\ncontent-type: " + kind +
                 "\r\ncontent-length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
  }

  void finish(const Held& request) {
    request->conn->request = nullptr;
    engine_.leave(request);
  }

  // -- questions ----------------------------------------------------------------------------------------

  void ask(Conn* conn, const std::string& path, const std::string& body) {
    Worker& worker = *conn->worker;
    if (path == "/health") return reply(conn, 200, "text/plain", "");
    if (path == "/version") return reply(conn, 200, "application/json", "{\"version\":\"0.32.0\"}");
    if (path == "/v1/models")
      return reply(conn, 200, "application/json",
                   "{\"object\":\"list\",\"data\":[{\"id\":\"" + options_.model +
                       "\",\"object\":\"model\",\"created\":0,\"owned_by\":\"vllm\",\"root\":\"" + options_.model +
                       "\",\"max_model_len\":1048576}]}");
    if (path == "/metrics") return reply(conn, 200, "text/plain; version=0.0.4", metrics(worker));
    if (path == "/mock/stats") return reply(conn, 200, "application/json", stats(worker));
    bool chat = path == "/v1/chat/completions";
    if (!chat && path != "/v1/completions" && path != "/tokenize")
      return reply(conn, 404, "application/json", "{\"error\":{\"message\":\"no such path\",\"code\":404}}");
    Json asked = parse_json(body);
    if (path == "/tokenize") {  // a gateway's two probes: canned
      const char* probe = asked["messages"].kind == Json::ARRAY ? "/chat" : "/prompt";
      std::stringstream text;
      text << std::ifstream(options_.tokenized + probe).rdbuf();
      return reply(conn, 200, "application/json", text.str());
    }
    auto request = std::make_shared<Request>();
    if (!read(asked, chat, *request))
      return reply(conn, 400, "application/json", "{\"error\":{\"message\":\"no prompt\",\"code\":400}}");
    request->conn = conn;
    request->worker = &worker;
    request->arrived = now();
    conn->request = request;
    engine_.enqueue(request);
  }

  bool read(const Json& asked, bool chat, Request& request) {
    std::vector<uint32_t> tokens;
    const Json& prompt = asked["prompt"];
    if (chat) {
      for (const Json& message : asked["messages"].items) words_.tokens(message["content"].text, tokens);
    } else if (prompt.kind == Json::STRING) {
      words_.tokens(prompt.text, tokens);
    } else {
      for (const Json& id : prompt.items) tokens.push_back(uint32_t(id.number));
    }
    if (tokens.empty()) return false;
    request.chat = chat;
    request.tokens = tokens.size();
    const std::string& salt = asked["cache_salt"].text;
    const std::string root = salt.empty() ? options_.root : salted_root(options_.name_space, salt);
    request.keys = chunk_keys(root, tokens, options_.pace.chunk_tokens);
    request.stream = asked["stream"].truth;
    request.usage = asked["stream_options"]["include_usage"].truth;
    const Json& most = chat && asked["max_tokens"].kind != Json::NUMBER ? asked["max_completion_tokens"]
                                                                        : asked["max_tokens"];
    if (most.kind == Json::NUMBER) request.asked = size_t(std::max(1.0, most.number));
    return true;
  }

  std::string metrics(const Worker& worker) {
    double usage = double(worker.running_tokens) / double(options_.pace.capacity * options_.pace.chunk_tokens);
    std::pair<const char*, double> gauges[] = {
        {"vllm:num_requests_running", double(worker.running + (worker.computing ? 1 : 0))},
        {"vllm:num_requests_waiting", double(worker.waiting.size())},
        {"vllm:kv_cache_usage_perc", std::min(1.0, usage)},
        {"vllm:gpu_cache_usage_perc", std::min(1.0, usage)},  // its older name, which some still read
        {"vllm:prefix_cache_queries_total", double(worker.prompt_tokens)},
        {"vllm:prefix_cache_hits_total", double(worker.cached_tokens)},
    };
    std::string text;
    for (const auto& [name, value] : gauges) {
      bool counter = strstr(name, "_total") != nullptr;
      text += std::string("# TYPE ") + name + (counter ? " counter\n" : " gauge\n") + name +
              "{engine=\"0\",model_name=\"" + options_.model + "\"} " + std::to_string(value) + "\n";
    }
    return text;
  }

  static std::string stats(const Worker& worker) {
    std::pair<const char*, size_t> counts[] = {
        {"requests", worker.requests},           {"finished", worker.finished},
        {"aborted", worker.aborted},             {"prompt_tokens", worker.prompt_tokens},
        {"cached_tokens", worker.cached_tokens}, {"queued_tokens", worker.queued_tokens},
        {"running", worker.running},             {"waiting", worker.waiting.size() + (worker.computing ? 1 : 0)},
    };
    std::string text = "{";
    for (const auto& [name, value] : counts)
      text += (text.size() > 1 ? ",\"" : "\"") + std::string(name) + "\":" + std::to_string(value);
    return text + "}";
  }

  // -- sockets ------------------------------------------------------------------------------------------

  void watch(int fd, uint32_t what, uint64_t name, int verb) {
    epoll_event event{};
    event.events = what;
    event.data.u64 = name;
    epoll_ctl(epoll_, verb, fd, &event);
  }

  void greet(int listener, Worker& worker) {
    for (int fd; (fd = accept4(listener, nullptr, nullptr, SOCK_NONBLOCK)) >= 0;) {
      int on = 1;
      setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
      watch(fd, EPOLLIN | EPOLLRDHUP, reinterpret_cast<uint64_t>(new Conn(fd, &worker)), EPOLL_CTL_ADD);
    }
  }

  void hear(Conn* conn) {
    if (conn->dead) return;
    char buffer[65536];
    for (;;) {
      ssize_t n = recv(conn->fd, buffer, sizeof buffer, 0);
      if (n > 0) {
        conn->in.append(buffer, size_t(n));
        continue;
      }
      if (n == 0 || (errno != EAGAIN && errno != EINTR)) return bury(conn);
      if (errno == EAGAIN) break;
    }
    parse(conn);
    flush(conn);
  }

  void parse(Conn* conn) {
    while (!conn->dead && !conn->request) {
      size_t head = conn->in.find("\r\n\r\n");
      if (head == std::string::npos) return;
      std::string lines = conn->in.substr(0, head);
      for (char& c : lines) c = char(c >= 'A' && c <= 'Z' ? c + 32 : c);
      size_t at = lines.find("\r\ncontent-length:");
      size_t length = at == std::string::npos ? 0 : strtoul(lines.c_str() + at + 17, nullptr, 10);
      if (lines.find("\r\ntransfer-encoding:") != std::string::npos) {
        conn->close_after = true;  // no caller of ours sends one
        return reply(conn, 411, "text/plain", "");
      }
      if (conn->in.size() < head + 4 + length) return;
      size_t from = lines.find(' ') + 1;
      std::string path = lines.substr(from, lines.find_first_of(" ?", from) - from);
      std::string body = conn->in.substr(head + 4, length);
      conn->in.erase(0, head + 4 + length);
      ask(conn, path, body);
    }
  }

  void flush(Conn* conn) {
    if (conn->dead) return;
    while (!conn->out.empty()) {
      ssize_t n = send(conn->fd, conn->out.data(), conn->out.size(), MSG_NOSIGNAL);
      if (n < 0 && errno != EAGAIN && errno != EINTR) return bury(conn);
      if (n < 0) break;
      conn->out.erase(0, size_t(n));
    }
    if (conn->close_after && conn->out.empty()) return bury(conn);
    if (conn->writing == conn->out.empty()) {
      conn->writing = !conn->out.empty();
      watch(conn->fd, EPOLLIN | EPOLLRDHUP | (conn->writing ? uint32_t(EPOLLOUT) : 0u), reinterpret_cast<uint64_t>(conn),
            EPOLL_CTL_MOD);
    }
  }

  void bury(Conn* conn) {
    if (conn->dead) return;
    conn->dead = true;
    if (Held request = conn->request) {
      request->worker->aborted++;
      finish(request);
    }
    close(conn->fd);
    graveyard_.push_back(conn);
  }

  Options options_;
  Words words_;
  Engine engine_;
  std::vector<Worker> workers_;
  std::vector<Conn*> graveyard_;
  int epoll_ = -1;
};

}  // namespace

int main(int count, char** args) {
  Options options;
  for (int i = 1; i + 1 < count; i += 2) {
    std::string name = args[i], value = args[i + 1];
    if (name == "--fd") options.listeners.push_back(atoi(value.c_str()));
    else if (name == "--prefill-rate") options.pace.prefill_rate = atof(value.c_str());
    else if (name == "--decode-rate") options.pace.decode_rate = atof(value.c_str());
    else if (name == "--chunk-tokens") options.pace.chunk_tokens = size_t(atol(value.c_str()));
    else if (name == "--capacity") options.pace.capacity = size_t(atol(value.c_str()));
    else if (name == "--model") options.model = value;
    else if (name == "--namespace") options.name_space = unhex(value);
    else if (name == "--root") options.root = unhex(value);
    else if (name == "--vocab") options.vocab = value;
    else if (name == "--tokenized") options.tokenized = value;
    else return fprintf(stderr, "unknown option %s\n", name.c_str()), 2;
  }
  signal(SIGPIPE, SIG_IGN);
  Mock(options).run();
}
