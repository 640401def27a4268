#include "program.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "refused.h"

namespace polyformer {
namespace {

constexpr int64_t MOST_WIDTH = 1 << 22, MOST_PARTS = 1 << 20, MAGIC = 0x504f4c59;

class Reader {
  public:
    Reader(const int64_t* words, int64_t count) : at_(words), left_(count) {}

    // The next whole number, which must be within these.
    int64_t number(int64_t least, int64_t most) {
        if (left_ < 1) refuse("the program is cut off");
        --left_;
        const int64_t found = *at_++;
        if (found < least || found > most)
            refuse("the program holds %lld where %lld … %lld is possible", (long long)found, (long long)least, (long long)most);
        return found;
    }

    float real() {
        if (left_ < 1) refuse("the program is cut off");
        --left_;
        double found;
        std::memcpy(&found, at_++, 8);
        if (!(std::fabs(found) <= 3e38)) refuse("the program holds a number that is not finite");
        return (float)found;
    }

    // How many things follow, each of one word at least.
    int64_t count() { return number(0, std::min(left_, MOST_PARTS)); }

    void end() const {
        if (left_) refuse("the program has %lld words too many", (long long)left_);
    }

  private:
    const int64_t* at_;
    int64_t left_;
};

class Decoder {
  public:
    Decoder(const int64_t* words, int64_t count) : in_(words, count) {}

    Program decode() {
        in_.number(MAGIC, MAGIC);
        program_.vocabulary = in_.number(1, MOST_WIDTH);
        program_.length = in_.number(0, (int64_t)1 << 40);
        for (int64_t n = in_.count(); n; --n) program_.registers.push_back(in_.number(1, MOST_WIDTH));
        for (int64_t n = in_.count(); n; --n) {
            const int64_t groups = in_.number(1, 1 << 16), width = in_.number(1, 1 << 16);
            program_.caches.push_back({groups, width, in_.number(0, 1) == 1, 0});
        }
        encoders_.assign(program_.caches.size(), false);
        for (int64_t n = in_.count(); n; --n) program_.waves.push_back(waves());
        for (int64_t n = in_.count(); n; --n) {
            const int64_t experts = in_.number(1, 1 << 12);
            program_.choices.push_back({experts, in_.number(1, experts)});
        }
        for (int64_t n = in_.count(); n; --n) {
            const int64_t rows = in_.number(1, MOST_WIDTH), columns = in_.number(1, MOST_WIDTH);
            program_.weights.push_back({rows, columns, in_.number(0, 1) == 1});
        }
        part(program_.read, false);
        part(program_.write, true);
        in_.end();
        find_windows();
        if (program_.write.empty()) refuse("the program writes nothing");
        const Instruction& last = program_.write.back();
        program_.scores = last.code == MULTIPLY ? last.products[0].out : last.out;
        if (program_.scores < 0 || program_.registers[(size_t)program_.scores] != program_.vocabulary)
            refuse("the program ends with no scores for its vocabulary");
        if (!picked_) refuse("the program never picks the rows whose scores are wanted");
        return program_;
    }

  private:
    Waves waves() {
        Waves found;
        found.strength = in_.real();
        for (int64_t n = in_.count(); n; --n) found.rates.push_back(in_.real());
        if (found.rates.empty()) refuse("the program has waves without rates");
        return found;
    }

    void part(std::vector<Instruction>& into, bool writing) {
        written_.assign(program_.registers.size(), false);
        chosen_.assign(program_.registers.size(), -1);
        made_.assign(program_.choices.size(), false);
        picked_ = false, writing_ = writing;
        for (int64_t n = in_.count(); n; --n) into.push_back(instruction());
    }

    int32_t index(size_t size) { return (int32_t)in_.number(0, (int64_t)size - 1); }

    // A register that is read: something must have been written to it, and of a certain width if that is not 0.
    int32_t input(int64_t width = 0) {
        const int32_t found = input_of_any();
        if (chosen_[(size_t)found] >= 0) refuse("the program reads register %d, which chosen experts made, as one row", found);
        if (width && wide(found) != width) refuse("the program reads register %d at another width than its own", found);
        return found;
    }

    // The same for one that may hold what chosen experts made.
    int32_t input_of_any() {
        const int32_t found = index(program_.registers.size());
        if (!written_[(size_t)found]) refuse("the program reads register %d before anything is in it", found);
        return found;
    }

    int32_t output(int64_t width) {
        const int32_t found = index(program_.registers.size());
        if (wide(found) != width) refuse("the program writes register %d at another width than its own", found);
        return found;
    }

    int64_t wide(int32_t number) const { return program_.registers[(size_t)number]; }

    int32_t matrix(int64_t columns) {
        const int32_t found = index(program_.weights.size());
        const WeightShape& shape = program_.weights[(size_t)found];
        if (!shape.packed || shape.columns != columns) refuse("weight %d is no matrix of %lld columns", found, (long long)columns);
        return found;
    }

    int32_t vector(int64_t width) {
        const int32_t found = (int32_t)in_.number(-1, (int64_t)program_.weights.size() - 1);
        if (found < 0) return found;
        const WeightShape& shape = program_.weights[(size_t)found];
        if (shape.packed || shape.rows != 1 || shape.columns != width)
            refuse("weight %d is no vector of %lld numbers", found, (long long)width);
        return found;
    }

    Instruction instruction() {
        Instruction one;
        int32_t made_by = -1;  // the choice whose experts made what it writes
        one.code = (Code)in_.number(0, CODES - 1);
        switch (one.code) {
            case TAKE_TOKENS: take(one); break;
            case ADD_PLACES: places(one); break;
            case NORM_ROWS: norm(one); break;
            case MULTIPLY: multiply(one); break;
            case ROTATE: rotate(one); break;
            case REMEMBER: remember(one); break;
            case LOOK: look(one); break;
            case CHOOSE_EXPERTS: choose(one); break;
            case MULTIPLY_CHOSEN: multiply_chosen(one); break;
            case BLEND_CHOSEN: blend(one); break;
            case DAMP_ROWS:
                one.x = input(), one.y = input(1), one.out = output(wide(one.x));
                if (one.out == one.x || one.out == one.y) refuse("the program damps a register into itself");
                break;
            case GATE:
            case ADD_ROWS:
                one.x = input_of_any(), one.y = input_of_any(), one.out = output(wide(one.x));
                if (wide(one.y) != wide(one.x)) refuse("the program reads register %d at another width than its own", one.y);
                if (chosen_[(size_t)one.x] != chosen_[(size_t)one.y]) refuse("the program mixes rows of different kinds");
                made_by = chosen_[(size_t)one.x];
                if (one.code == GATE) one.choice = (int32_t)in_.number(0, 7);
                break;
            case PICK_ROWS:
                if (picked_ || !writing_) refuse("the program picks rows twice");
                one.x = input(), one.out = output(wide(one.x));
                if (one.out == one.x) refuse("the program picks rows into the register that they are in");
                picked_ = true;
                written_.assign(written_.size(), false);
                break;
            case APPLY:
            case SCALE_ROWS:
            case CLIP_ROWS:
            case CAP_ROWS:
                one.x = input_of_any(), made_by = chosen_[(size_t)one.x], one.out = output(wide(one.x));
                if (one.code == APPLY) one.choice = (int32_t)in_.number(0, 7);
                if (one.code == SCALE_ROWS) one.scale = in_.real();
                if (one.code == CLIP_ROWS || one.code == CAP_ROWS) one.cap = in_.real();
                break;
            default: refuse("the program has an instruction that there is not");
        }
        if (one.out >= 0) written_[(size_t)one.out] = true, chosen_[(size_t)one.out] = made_by;
        for (const Product& product : one.products) {
            written_[(size_t)product.out] = true;
            chosen_[(size_t)product.out] = one.code == MULTIPLY_CHOSEN ? one.number : -1;
        }
        return one;
    }

    void find_windows() {
        std::vector<bool> whole(program_.caches.size());
        for (const Instruction& one : program_.write) {
            if (one.code != LOOK) continue;
            int64_t& window = program_.caches[(size_t)one.number].window;
            window = std::max(window, one.window);
            if (!one.window) whole[(size_t)one.number] = true;
        }
        for (size_t i = 0; i < whole.size(); ++i)
            if (whole[i]) program_.caches[i].window = 0;
    }

    void before_picking() const {
        if (picked_) refuse("the program looks at other rows after it has picked some");
    }

    void take(Instruction& one) {
        before_picking();
        one.weight = index(program_.weights.size());
        const WeightShape& shape = program_.weights[(size_t)one.weight];
        if (!shape.packed) refuse("weight %d is no table", one.weight);
        one.out = output(shape.columns), one.scale = in_.real();
        int64_t& tokens = writing_ ? program_.tokens_written : program_.tokens_read;
        tokens = tokens ? std::min(tokens, shape.rows) : shape.rows;
    }

    void places(Instruction& one) {
        before_picking();
        one.x = input(), one.out = output(wide(one.x)), one.weight = matrix(wide(one.x));
        one.offset = in_.number(0, 1 << 20);
        const int64_t length = program_.weights[(size_t)one.weight].rows - one.offset;
        if (length < 1) refuse("weight %d is shorter than its offset", one.weight);
        program_.length = program_.length ? std::min(program_.length, length) : length;
    }

    void norm(Instruction& one) {
        one.x = input(), one.out = output(wide(one.x));
        one.choice = (int32_t)in_.number(0, 1), one.width = in_.number(1, wide(one.x));
        if (wide(one.x) % one.width) refuse("rows of %lld can't be normed in pieces of %lld", (long long)wide(one.x), (long long)one.width);
        one.eps = in_.real(), one.offset = 0, one.scale = in_.real();
        if (!(one.eps >= 0)) refuse("a norm's eps can't be negative");
        one.weight = vector(one.width), one.bias = vector(one.width);
    }

    void multiply(Instruction& one) {
        one.x = input();
        const int64_t count = in_.count();
        if (!count) refuse("the program multiplies by nothing");
        for (int64_t i = 0; i < count; ++i) {
            Product product;
            product.matrix = matrix(wide(one.x));
            const int64_t rows = program_.weights[(size_t)product.matrix].rows;
            product.bias = vector(rows), product.out = output(rows);
            if (product.out == one.x) refuse("the program multiplies a register into itself");
            for (const Product& other : one.products)
                if (other.out == product.out) refuse("the program writes register %d twice at once", product.out);
            one.products.push_back(product);
        }
    }

    void choose(Instruction& one) {
        before_picking();
        one.x = input(), one.out = index(program_.registers.size()), one.number = index(program_.choices.size());
        const ExpertChoice& choice = program_.choices[(size_t)one.number];
        if (wide(one.x) != choice.experts || wide(one.out) != choice.chosen) refuse("choice %d is of another width", one.number);
        if (one.out == one.x) refuse("the program chooses in a register from itself");
        one.choice = (int32_t)in_.number(0, 1), one.capacity = in_.number(0, 1 << 30);
        for (size_t i = 0; i < chosen_.size(); ++i)  // what was made by the last choice is lost
            if (chosen_[i] == one.number) written_[i] = false;
        made_[(size_t)one.number] = true;
    }

    int32_t choice_made() {
        const int32_t found = index(program_.choices.size());
        if (!made_[(size_t)found]) refuse("the program asks the experts of choice %d before any are chosen", found);
        return found;
    }

    void multiply_chosen(Instruction& one) {
        before_picking();
        one.x = input_of_any(), one.number = choice_made();
        const ExpertChoice& choice = program_.choices[(size_t)one.number];
        const int32_t made = chosen_[(size_t)one.x];
        if (made >= 0 && (made != one.number || wide(one.x) % choice.chosen)) refuse("the program mixes the rows of choices");
        one.width = made < 0 ? wide(one.x) : wide(one.x) / choice.chosen;
        one.choice = made >= 0;
        const int64_t outs = in_.count();
        if (!outs) refuse("the program multiplies by nothing");
        for (int64_t i = 0; i < outs; ++i) {
            Product product;
            product.out = index(program_.registers.size());
            if (product.out == one.x || wide(product.out) % choice.chosen) refuse("register %d can't hold what chosen experts make", product.out);
            for (const Product& other : one.products)
                if (other.out == product.out) refuse("the program writes register %d twice at once", product.out);
            const int64_t rows = wide(product.out) / choice.chosen;
            for (int64_t expert = 0; expert < choice.experts; ++expert) {
                product.matrix = matrix(one.width), product.bias = vector(rows);
                if (program_.weights[(size_t)product.matrix].rows != rows) refuse("weight %d is no matrix of %lld rows", product.matrix, (long long)rows);
                one.products.push_back(product);
            }
        }
    }

    void blend(Instruction& one) {
        before_picking();
        one.x = input_of_any(), one.y = input();
        one.out = index(program_.registers.size()), one.number = choice_made();
        const int64_t chosen = program_.choices[(size_t)one.number].chosen;
        if (chosen_[(size_t)one.x] != one.number) refuse("register %d holds nothing that the experts of choice %d made", one.x, one.number);
        if (wide(one.y) != chosen || wide(one.x) != chosen * wide(one.out)) refuse("register %d is of another width", one.out);
        if (one.out == one.x || one.out == one.y) refuse("the program blends a register into itself");
    }

    void rotate(Instruction& one) {
        before_picking();
        one.x = input(), one.out = output(wide(one.x)), one.number = index(program_.waves.size());
        one.heads = in_.number(1, wide(one.x)), one.choice = (int32_t)in_.number(0, 1);
        const int64_t turned = 2 * (int64_t)program_.waves[(size_t)one.number].rates.size();
        if (wide(one.x) % one.heads || wide(one.x) / one.heads < turned) refuse("heads are narrower than what is rotated");
    }

    // What the encoder holds of its own text is gone when the decoder runs.
    void keep_apart(const Instruction& one) {
        if (program_.caches[(size_t)one.number].memory) return;
        if (!writing_) encoders_[(size_t)one.number] = true;
        if (writing_ && encoders_[(size_t)one.number]) refuse("cache %d belongs to the encoder", one.number);
    }

    void remember(Instruction& one) {
        before_picking();
        one.x = input(), one.y = input(wide(one.x)), one.number = index(program_.caches.size());
        const CacheShape& shape = program_.caches[(size_t)one.number];
        if (shape.groups * shape.width != wide(one.x)) refuse("cache %d is of another width", one.number);
        if (shape.memory && writing_) refuse("cache %d is not written by this part of the program", one.number);
        keep_apart(one);
    }

    void look(Instruction& one) {
        before_picking();
        one.x = input(), one.number = index(program_.caches.size()), one.heads = in_.number(1, 1 << 16);
        const CacheShape& shape = program_.caches[(size_t)one.number];
        if (one.heads % shape.groups || one.heads * shape.width != wide(one.x)) refuse("cache %d doesn't fit its queries", one.number);
        one.out = output(wide(one.x));
        if (one.out == one.x) refuse("the program looks with a register into itself");
        one.scale = in_.real(), one.choice = (int32_t)in_.number(0, 1), one.window = in_.number(0, (int64_t)1 << 40);
        if (writing_ && (one.choice == 1) != shape.memory) refuse("cache %d can't be looked at by this rule", one.number);
        if (!writing_ && (one.choice == 0 || shape.memory)) refuse("a text that is read is looked at as a whole");
        keep_apart(one);
        one.cap = in_.real();
        one.bias_kind = (int32_t)in_.number(0, 3);
        if (one.bias_kind == SLOPES || one.bias_kind == ROUNDED_SLOPES) {
            one.eps = in_.real();  // the scale of slopes
            for (int64_t i = 0; i < one.heads; ++i) one.slopes.push_back(in_.real());
        } else if (one.bias_kind == BUCKETS) {
            one.weight = index(program_.weights.size());
            one.buckets = in_.number(4, 1 << 16), one.distance = in_.number(1, 1 << 30), one.two_sided = in_.number(0, 1) == 1;
            const WeightShape& table = program_.weights[(size_t)one.weight];
            if (table.packed || table.rows != one.buckets || table.columns != one.heads) refuse("weight %d is no table of buckets", one.weight);
            if (one.distance <= one.buckets / (one.two_sided ? 4 : 2)) refuse("buckets reach no further than the exact ones");
        }
    }

    Reader in_;
    Program program_;
    std::vector<bool> written_, encoders_, made_;
    std::vector<int32_t> chosen_;  // of each register, the choice whose experts made what it holds, or -1
    bool picked_ = false, writing_ = false;
};

}  // namespace

Program decode(const int64_t* words, int64_t count) { return Decoder(words, count).decode(); }

}  // namespace polyformer
