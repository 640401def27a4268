// Threads that wait for work within one call. They spin for some microseconds, since work comes in pieces as small as
// that, then give their turn to others, so that two programs on the same cores don't starve each other; and between
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

inline void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

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

    // Let every thread do the work, each told its number; the caller is number 0.
    void run(const std::function<void(int)>& work) {
        if (threads_ > 1) {
            {
                std::lock_guard<std::mutex> lock(mutex_);
                work_ = &work;
                ++called_;
            }
            wake_.notify_all();
        }
        work(0);
        meet();  // all have done it
    }

    // Wait for all threads.
    void meet() {
        if (threads_ == 1) return;
        const unsigned now = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(now + 1, std::memory_order_release);
            return;
        }
        for (int turns = 0; round_.load(std::memory_order_acquire) == now; ++turns) {
            if (turns < PATIENCE) {
                pause_briefly();
            } else {
                sched_yield();
            }
        }
    }

  private:
    static constexpr int PATIENCE = 1000;

    void serve(int number) {
        unsigned seen = 0;
        for (;;) {
            for (int turns = 0; called_.load(std::memory_order_acquire) == seen && turns < PATIENCE; ++turns)
                pause_briefly();
            const std::function<void(int)>* work;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return called_.load(std::memory_order_relaxed) != seen; });
                seen = called_.load(std::memory_order_relaxed);
                if (ending_) return;
                work = work_;
            }
            (*work)(number);
            meet();
        }
    }

    const int threads_;
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    const std::function<void(int)>* work_ = nullptr;
    bool ending_ = false;
    std::atomic<unsigned> called_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<unsigned> round_{0};
};

}  // namespace polyformer
