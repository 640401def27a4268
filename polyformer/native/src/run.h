// Runs programs: what a model holds, what sequences hold, and one call for each step.
#pragma once

#include <atomic>
#include <functional>
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

// Where in a store the keys and values of a cache are, in numbers; scales are floats of their own. Where the last tokens
// of a text are held only, `room` says of how many, and `window` how many keys a row looks at, which else is 0.
struct Place {
    int64_t keys = -1, values = -1, key_scales = 0, value_scales = 0;
    int64_t room = 0, window = 0;
};

// What of a sequence is held: of keys, 16 tokens' numbers side by side; of values, each token's behind the last one's.
struct Store {
    Memory<uint8_t> cells;
    Memory<float> scales;
    int64_t length = 0, touched = 0;  // tokens now, and at most so far
    std::vector<int64_t> first;       // of each cache, the place of the first token held, at the beginning of a panel
};

struct Settings {
    int64_t slots, room;
    Cell cell;
    int threads;
    bool plain;
    // Before each window, so many tokens more are held, so that as many can be taken back; and where there are windows,
    // a step of more rows than `at_once` is run in pieces.
    int64_t retracts = 64, at_once = 256;
};

// The tokens of a step.
struct Tokens {
    int64_t count;
    const int64_t *ids, *slots, *places;
    int64_t wanted;
    const int64_t* rows;
};

// Which next tokens are looked for: how many for each row, and which are none, in order.
struct Choice {
    int64_t count, barred;
    const int64_t* forbidden;
};

// Which experts the rows of a step go to. What chosen experts make stands in the order of the experts: in a register of
// `chosen` pieces to a row, the pieces of one expert's rows stand side by side.
struct Chosen {
    std::vector<int32_t> experts, places, rows;  // of each row's choices, the expert and the place; of each place, its row
    std::vector<int64_t> starts;                 // of each expert, its first place; and the end
    std::vector<int32_t> active;                 // experts that have rows
    std::vector<int32_t> taken;                  // how many rows of a slot an expert has
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
    // Run the program, and find the likeliest next tokens: logarithms of probabilities and ids [wanted, count], best
    // first; of equal ones, lower ids come first. What is forbidden keeps its share of the probability. Where there are
    // too few, others with -inf follow; where scores are no numbers, neither are logarithms.
    void best(const Tokens& tokens, const Choice& choice, float* likely, int64_t* ids);
    // Let the encoder read texts for slots; the tokens of a slot stand side by side.
    void read(int64_t count, const int64_t* ids, const int64_t* slots);
    void truncate(int64_t slot, int64_t length);
    void copy(int64_t source, int64_t target, int64_t length);
    int64_t length(int64_t slot) const;
    // The least length above 0 that a slot can be cut back to.
    int64_t earliest(int64_t slot) const;
    void clear(int64_t slot);
    // The memory that slots take: whole pages, as far as they were written to.
    int64_t bytes() const;
    int64_t bytes_for(int64_t tokens, int64_t source) const;
    const char* kernels() const { return kernels_.name; }

  private:
    struct Slot {
        std::shared_ptr<Store> text, memory;
    };
    // Takes scores of rows as they come: of which of those wanted they are.
    using Taker = std::function<void(const std::vector<int64_t>&)>;
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
    void check_length(int64_t slot, int64_t length) const;
    void check(const Tokens& tokens) const;
    void make_room(int64_t rows, int64_t picked);
    void measure();
    void advance(const Tokens& tokens, const Taker& take);
    void run_piece(const Tokens& tokens, int64_t begin, int64_t end, const Taker& take);
    void slide(Store& text, int64_t begin, int64_t end) const;
    void best_of(const float* scores, const Choice& choice, float* likely, int64_t* ids, int thread);
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
    void choose(const Instruction& one);
    void choose_for(const Instruction& one, int64_t row, Chosen& chosen);
    void gather(const Instruction& one, int64_t row);
    void products_of_chosen(const Instruction& one, int64_t piece);
    void blend(const Instruction& one, int64_t row);
    int64_t pieces_of_chosen(const Instruction& one) const;
    int64_t experts_at_once(const Instruction& one) const;
    void make_room_for_chosen(int64_t rows);
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
    std::vector<std::shared_ptr<Store>> transient_;  // of each text that is read
    std::vector<int64_t> texts_;                     // the text of each row
    bool is_reading_ = false, looks_back_ = false, slides_ = false;

    // Of the step that is run.
    Tokens tokens_{};
    int64_t row_room_ = 0, picked_room_ = 0, widest_coded_ = 0;
    std::vector<bool> of_all_rows_;  // registers that hold more than the rows whose scores are wanted
    std::vector<Memory<float>> registers_;
    Memory<int8_t> codes_;
    Memory<float> code_scales_, code_sums_;
    std::vector<Memory<float>> cosines_;
    std::vector<Chosen> chosen_;
    Memory<float> gathered_;
    Memory<int8_t> gathered_codes_;
    Memory<float> gathered_scales_, gathered_sums_;
    std::vector<std::vector<Piece>> pieces_;  // of each phase that looks
    std::vector<Memory<float>> scratch_;
    std::vector<std::vector<float>> scans_;
    std::vector<int64_t> counts_;  // of pieces, of each phase
};

}  // namespace polyformer
