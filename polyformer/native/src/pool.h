// Threads that help with a call's work. Work comes in pieces that whoever is there takes, so that a thread which the
// system has put aside keeps nobody waiting unless it holds a piece; two programs on the same cores don't starve each
// other. Threads spin for some microseconds, since pieces are as short as that, then give their turn to others; between
// calls they sleep.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <sched.h>
#include <thread>
#include <vector>

namespace polyformer {

// Waits a little longer each time that it is asked to.
class Patience {
  public:
    void wait() {
        if (++turns_ > TURNS) {
            sched_yield();
            return;
        }
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ __volatile__("yield");
#endif
    }
    bool over() const { return turns_ > TURNS; }

  private:
    static constexpr int TURNS = 1000;
    int turns_ = 0;
};

class Pool {
  public:
    explicit Pool(int threads) : threads_(threads) {
        for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { serve(i); });
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            ending_ = true;
            ++called_;
        }
        wake_.notify_all();
        for (std::thread& worker : workers_) worker.join();
    }

    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return threads_; }

    // Do the work, each thread told its number (the caller's is 0), as many of them as come before it is done.
    void run(const std::function<void(int)>& work) {
        if (threads_ == 1) return work(0);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            work_ = &work;
            ++called_;
        }
        wake_.notify_all();
        work(0);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            work_ = nullptr;
        }
        for (Patience patience; inside_.load(std::memory_order_acquire);) patience.wait();
    }

  private:
    void serve(int number) {
        unsigned seen = 0;
        for (;;) {
            for (Patience patience; called_.load(std::memory_order_acquire) == seen && !patience.over();) patience.wait();
            const std::function<void(int)>* work;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return called_.load(std::memory_order_relaxed) != seen; });
                seen = called_.load(std::memory_order_relaxed);
                if (ending_) return;
                work = work_;
                if (work) inside_.fetch_add(1, std::memory_order_relaxed);
            }
            if (!work) continue;
            (*work)(number);
            inside_.fetch_sub(1, std::memory_order_release);
        }
    }

    const int threads_;
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    const std::function<void(int)>* work_ = nullptr;
    bool ending_ = false;
    std::atomic<unsigned> called_{0};
    alignas(64) std::atomic<int> inside_{0};
};

// Pieces of work that threads take, one by one, and that are all done before any goes on.
class Share {
  public:
    void set(int64_t pieces) {
        pieces_ = pieces;
        taken_.store(0, std::memory_order_relaxed);
        done_.store(0, std::memory_order_relaxed);
    }

    template <class Work>
    void work(Work work) {
        for (;;) {
            const int64_t piece = taken_.fetch_add(1, std::memory_order_relaxed);
            if (piece >= pieces_) break;
            work(piece);
            done_.fetch_add(1, std::memory_order_release);
        }
        for (Patience patience; done_.load(std::memory_order_acquire) < pieces_;) patience.wait();
    }

  private:
    int64_t pieces_ = 0;
    alignas(64) std::atomic<int64_t> taken_{0};
    alignas(64) std::atomic<int64_t> done_{0};
};

}  // namespace polyformer
