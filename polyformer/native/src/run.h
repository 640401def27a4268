// Runs programs: what a model holds, what sequences hold, and one call for each step.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "kernels.h"
#include "matrix.h"
#include "pool.h"
#include "program.h"

namespace polyformer {

// Keys that stand side by side, and rows of one sequence whose attention is one piece of work.
constexpr int64_t PANEL = 16, PIECE = 12;

inline int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A program and its weights.
class Model {
  public:
    explicit Model(Program program);
    void give(int64_t number, Kind kind, const Given& given);
    // Refuses as long as a weight is missing.
    void check() const;

    Program program;
    std::vector<Matrix> matrices;
    std::vector<std::vector<float>> vectors;

  private:
    std::vector<bool> given_;
};

// Where in a store the keys and values of a cache are, in numbers; scales are floats of their own.
struct Place {
    int64_t keys = -1, values = -1, key_scales = 0, value_scales = 0;
};

// What of a sequence is held: of keys, 16 tokens' numbers side by side; of values, each token's behind the last one's.
struct Store {
    Memory<uint8_t> cells;
    Memory<float> scales;
    int64_t length = 0, touched = 0;  // tokens now, and at most so far
};

struct Settings {
    int64_t slots, room;
    Cell cell;
    int threads;
    bool plain;
};

// The tokens of a step.
struct Tokens {
    int64_t count;
    const int64_t *ids, *slots, *places;
    int64_t wanted;
    const int64_t* rows;
};

// One piece of attention's work: some rows of one sequence, and some heads that share keys.
struct Piece {
    int64_t row, rows, group, head, heads;
};

class State {
  public:
    State(const Model& model, const Settings& settings);

    // Run the program for some tokens; scores [wanted, vocabulary].
    void step(const Tokens& tokens, float* scores);
    // Let the encoder read a text for a slot.
    void read(int64_t slot, int64_t count, const int64_t* ids);
    void truncate(int64_t slot, int64_t length);
    void copy(int64_t source, int64_t target, int64_t length);
    int64_t length(int64_t slot) const;
    void clear(int64_t slot);
    // The memory that slots take: whole pages, as far as they were written to.
    int64_t bytes() const;
    int64_t bytes_for(int64_t tokens, int64_t source) const;
    const char* kernels() const { return kernels_.name; }

  private:
    struct Slot {
        std::shared_ptr<Store> text, memory;
    };
    // What can be done at once, before all of it must be there: row by row, products, or attention.
    struct Phase {
        std::vector<const Instruction*> rows;
        const Instruction* all = nullptr;
        bool picked = false;  // only the rows go on whose scores are wanted
        const Instruction* quantised_for = nullptr;
    };

    // What a thread will read of memory in a phase to come, as far as it has not been fetched yet.
    struct Ahead {
        size_t phase = 0;
        std::vector<std::pair<const uint8_t*, int64_t>> bytes;
    };

    std::vector<Phase> phases_of(const std::vector<Instruction>& part) const;
    std::vector<Place> layout(bool memory, bool reading, int64_t* cells, int64_t* scales) const;
    int64_t bytes_for(const std::vector<Place>& layout, int64_t tokens) const;
    std::shared_ptr<Store> store(int64_t cells, int64_t scales) const;
    void check(const Tokens& tokens) const;
    void make_room(int64_t rows);
    void run(const std::vector<Phase>& phases, const Tokens& tokens);
    void work(const std::vector<Phase>& phases, int thread);
    void part(const Phase& phase, size_t number, int64_t piece, int thread);
    void fetch(const std::vector<Phase>& phases, size_t done, int thread, Ahead& ahead) const;
    bool look_ahead(const std::vector<Phase>& phases, size_t done, int thread, Ahead& ahead) const;
    void row_by_row(const Phase& phase, int64_t first, int64_t end);
    void one_row(const Instruction& one, int64_t row);
    void turn(const Instruction& one, int64_t row);
    void remember(const Instruction& one, int64_t row);
    void quantise(const Instruction& one, int64_t row);
    void products(const Phase& phase, int64_t begin, int64_t count);
    void make_waves(int64_t first, int64_t end);
    int64_t rows_of(const Phase& phase) const;
    int64_t rows_at_once(int64_t rows) const;
    int64_t blocks_at_once(int64_t blocks) const;
    int64_t blocks_of(const Instruction& one) const;
    void look(const Instruction& one, const Piece& piece, int thread);
    void score(const Instruction& one, const Piece& piece, float* scores, int64_t width, int64_t first, int64_t end, int thread);
    void mix(const Instruction& one, const Piece& piece, float* scores, int64_t width, int64_t first, int64_t end, int thread);
    void add_bias(const Instruction& one, float* scores, int64_t head, int64_t place, int64_t first, int64_t count) const;
    void pieces_of(const Instruction& one, std::vector<Piece>& into) const;
    int64_t keys_of(const Instruction& one, int64_t row) const;
    Store& store_of(const Instruction& one, int64_t row) const;
    const Place& place_of(const Instruction& one) const;
    float* row_of(int32_t number, int64_t row) const;
    int64_t wide(int32_t number) const { return model_.program.registers[(size_t)number]; }
    bool coded(const Instruction& one) const;

    const Model& model_;
    const Settings settings_;
    const Kernels& kernels_;
    Pool pool_;
    Turns turns_;
    std::vector<Phase> write_, read_;
    std::vector<Place> text_, memory_, reading_;
    int64_t text_cells_ = 0, text_scales_ = 0, memory_cells_ = 0, memory_scales_ = 0, reading_cells_ = 0, reading_scales_ = 0;
    std::vector<Slot> slots_;
    std::shared_ptr<Store> transient_;
    bool is_reading_ = false, looks_back_ = false;

    // Of the step that is run.
    Tokens tokens_{};
    int64_t row_room_ = 0;
    std::vector<Memory<float>> registers_;
    Memory<int8_t> codes_;
    Memory<float> code_scales_, code_sums_;
    std::vector<Memory<float>> cosines_;
    std::vector<std::vector<Piece>> pieces_;  // of each phase that looks
    std::vector<Memory<float>> scratch_;
    std::vector<int64_t> counts_;  // of pieces, of each phase
};

}  // namespace polyformer
