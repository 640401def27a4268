// Threads that help with a call's work. Work comes in pieces that whoever is there takes, so that a thread which the
// system has put aside keeps nobody waiting unless it holds a piece; two programs on the same cores don't starve each
// other. Threads spin for some microseconds, since pieces are as short as that, then give their turn to others; between
// calls they sleep.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
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

// Turns of work, one after the other. A turn's work comes in pieces, of which each thread takes those of its own share
// first and then what others have left; nobody goes on to the next turn before all of them are done. Whoever ends the
// last piece does what closes the turn, alone.
class Turns {
  public:
    explicit Turns(int threads) : shares_((size_t)threads) {}

    // Forget all turns, while nobody works.
    void begin() {
        for (Counter& one : shares_) one.word.store(0, std::memory_order_relaxed);
        done_.word.store(0, std::memory_order_relaxed);
        closed_.word.store(0, std::memory_order_relaxed);
    }

    // Do a thread's part of a turn. Turns are numbered from 1; `pieces` is the same for all who take part in one.
    template <class Work, class Close, class Meanwhile>
    void work(uint32_t turn, int64_t pieces, int thread, Work work, Close close, Meanwhile meanwhile) {
        if (closed_.word.load(std::memory_order_acquire) >= turn) return;
        const int64_t threads = (int64_t)shares_.size();
        int64_t mine = 0;
        for (int64_t i = 0; i < threads; ++i) {
            const int64_t share = (thread + i) % threads, first = pieces * share / threads, end = pieces * (share + 1) / threads;
            for (int64_t piece; (piece = take(shares_[(size_t)share], turn, first, end)) >= 0; ++mine) work(piece);
        }
        if (mine && add(turn, mine) == pieces) {
            close();
            closed_.word.store(turn, std::memory_order_release);
            return;
        }
        for (Patience patience; closed_.word.load(std::memory_order_acquire) < turn; patience.wait()) meanwhile();
    }

  private:
    // A turn's number and how many of its pieces are taken or done; what an earlier turn left counts as none.
    struct alignas(64) Counter {
        std::atomic<uint64_t> word{0};
    };

    static int64_t take(Counter& share, uint32_t turn, int64_t first, int64_t end) {
        uint64_t seen = share.word.load(std::memory_order_relaxed);
        for (;;) {
            if (seen >> 32 > turn) return -1;
            const int64_t piece = seen >> 32 == turn ? (int64_t)(uint32_t)seen : first;
            if (piece >= end) return -1;
            if (share.word.compare_exchange_weak(seen, (uint64_t)turn << 32 | (uint64_t)(piece + 1), std::memory_order_relaxed)) return piece;
        }
    }

    int64_t add(uint32_t turn, int64_t pieces) {
        uint64_t seen = done_.word.load(std::memory_order_relaxed), next;
        do next = (seen >> 32 == turn ? seen : (uint64_t)turn << 32) + (uint64_t)pieces;
        while (!done_.word.compare_exchange_weak(seen, next, std::memory_order_acq_rel, std::memory_order_relaxed));
        return (int64_t)(uint32_t)next;
    }

    std::vector<Counter> shares_;
    Counter done_, closed_;
};

}  // namespace polyformer
