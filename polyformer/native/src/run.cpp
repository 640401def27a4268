#include "run.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "refused.h"
#include "vectors.h"

namespace polyformer {

namespace {

constexpr int64_t MOST_ROWS = 1 << 16;

// The nearest whole number from -127 to 127; 0 for what is no number.
int8_t code_of(float x) { return (int8_t)(x >= -127 ? x <= 127 ? std::nearbyint(x) : 127 : x < -127 ? -127 : 0); }

}  // namespace

Model::Model(Program given)
    : program(std::move(given)), matrices(program.weights.size()), vectors(program.weights.size()),
      given_(program.weights.size()) {}

void Model::give(int64_t number, Kind kind, const Given& given) {
    if (number < 0 || number >= (int64_t)program.weights.size()) refuse("there is no weight %lld", (long long)number);
    const WeightShape& shape = program.weights[(size_t)number];
    if (shape.packed) {
        matrices[(size_t)number] = pack(kind, shape.rows, shape.columns, given);
    } else {
        vectors[(size_t)number] = plain(shape.rows, shape.columns, given);
    }
    given_[(size_t)number] = true;
}

void Model::check() const {
    for (size_t i = 0; i < given_.size(); ++i)
        if (!given_[i]) refuse("weight %zu was not given", i);
    for (const auto* part : {&program.write, &program.read})
        for (const Instruction& one : *part)
            if (one.code == ADD_PLACES && matrices[(size_t)one.weight].kind != F32) refuse("places are held as floats");
}

State::State(const Model& model, const Settings& settings)
    : model_(model), settings_(settings), kernels_(kernels_here(settings.plain)), pool_(settings.threads), turns_(settings.threads) {
    model.check();
    const Program& program = model.program;
    text_ = layout(false, false, &text_cells_, &text_scales_);
    memory_ = layout(true, false, &memory_cells_, &memory_scales_);
    reading_ = layout(false, true, &reading_cells_, &reading_scales_);
    slots_.resize((size_t)settings.slots);
    write_ = phases_of(program.write), read_ = phases_of(program.read);
    registers_.resize(program.registers.size());
    cosines_.resize(program.waves.size());
    chosen_.resize(program.choices.size());
    pieces_.resize(std::max(write_.size(), read_.size()));
    for (const Place& place : text_) slides_ |= place.window > 0;
    for (const Instruction& one : program.write)
        looks_back_ |= one.code == LOOK && program.caches[(size_t)one.number].memory;
    scratch_.resize((size_t)settings.threads);
    scans_.assign((size_t)settings.threads, std::vector<float>((size_t)((program.vocabulary + SCAN - 1) / SCAN)));
    counts_.resize(std::max(write_.size(), read_.size()));
    measure();
}

// How large what a step needs must be: scores, which are wide, are only made of the rows for which they are wanted.
void State::measure() {
    of_all_rows_.assign(registers_.size(), false);
    for (const auto* phases : {&write_, &read_}) {
        for (const Phase& phase : *phases) {
            std::vector<const Instruction*> all = phase.rows;
            if (phase.all) all.push_back(phase.all);
            for (const Instruction* one : all) {
                if (one->code == MULTIPLY) widest_coded_ = std::max(widest_coded_, wide(one->x));
                if (phase.picked) continue;
                for (const int32_t number : {one->x, one->y, one->out})
                    if (number >= 0) of_all_rows_[(size_t)number] = true;
                for (const Product& product : one->products) of_all_rows_[(size_t)product.out] = true;
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Steps

bool State::coded(const Instruction& one) const {
    for (const Product& product : one.products)
        if (model_.matrices[(size_t)product.matrix].kind != F32) return true;
    return false;
}

std::vector<State::Phase> State::phases_of(const std::vector<Instruction>& part) const {
    std::vector<Phase> found(1);
    bool picked = false;
    for (const Instruction& one : part) {
        if (one.code == MULTIPLY || one.code == LOOK || one.code == CHOOSE_EXPERTS || one.code == MULTIPLY_CHOSEN) {
            if ((one.code == MULTIPLY && coded(one)) || one.code == MULTIPLY_CHOSEN) found.back().quantised_for = &one;
            found.back().picked = picked;
            Phase all;
            all.all = &one, all.picked = picked;
            found.push_back(all);
            found.emplace_back();
        } else if (one.code == PICK_ROWS) {
            found.back().picked = picked;
            picked = true;
            found.emplace_back();
            found.back().rows.push_back(&one);
        } else {
            // Blending looks at pieces that stand in other rows, which must be made by then, and not be in use again
            if (one.code == BLEND_CHOSEN) found.emplace_back();
            found.back().picked = picked;
            found.back().rows.push_back(&one);
            if (one.code == BLEND_CHOSEN) found.emplace_back();
        }
        found.back().picked = picked;
    }
    found.erase(std::remove_if(found.begin(), found.end(),
                               [](const Phase& one) { return !one.all && one.rows.empty() && !one.quantised_for; }),
                found.end());
    return found;
}

void State::check(const Tokens& tokens) const {
    const Program& program = model_.program;
    const int64_t known = is_reading_ ? program.tokens_read : program.tokens_written;
    if (tokens.count < 1 || tokens.count > MOST_ROWS) refuse("a step takes 1 to %lld tokens", (long long)MOST_ROWS);
    std::vector<int64_t> ends((size_t)settings_.slots, -1);
    for (int64_t i = 0; i < tokens.count; ++i) {
        const int64_t slot = tokens.slots[i], place = tokens.places[i], held = is_reading_ ? i : length(slot);
        if (known && (tokens.ids[i] < 0 || tokens.ids[i] >= known))
            refuse("there is no token %lld in a vocabulary of %lld", (long long)tokens.ids[i], (long long)known);
        int64_t& end = ends[(size_t)slot];
        if (end < 0 && place > 0 && !is_reading_ && place < earliest(slot))
            refuse("slot %lld has forgotten what a token at place %lld looks at", (long long)slot, (long long)place);
        if (place < 0 || (end < 0 ? place > held : place != end))
            refuse("slot %lld holds %lld tokens; the next can't stand at place %lld", (long long)slot, (long long)(end < 0 ? held : end), (long long)place);
        if (place >= settings_.room) refuse("place %lld is beyond the room for %lld tokens", (long long)place, (long long)settings_.room);
        if (program.length && place >= program.length) refuse("place %lld is beyond the model's %lld places", (long long)place, (long long)program.length);
        end = place + 1;
    }
    if (tokens.wanted < 0 || tokens.wanted > tokens.count) refuse("more scores are wanted than there are tokens");
    for (int64_t i = 0; i < tokens.wanted; ++i)
        if (tokens.rows[i] < 0 || tokens.rows[i] >= tokens.count) refuse("scores are wanted of a row that isn't there");
}

void State::make_room(int64_t rows, int64_t picked) {
    const Program& program = model_.program;
    const auto make = [&](int64_t count, bool of_all_rows) {
        for (size_t i = 0; i < registers_.size(); ++i)
            if (of_all_rows_[i] == of_all_rows) registers_[i] = memory_for<float>(product_of(count, program.registers[i]) + 2 * BLOCK);
    };
    if (rows > row_room_) {
        row_room_ = 0;  // should memory run out in between
        make(rows, true);
        const int64_t groups = (std::max<int64_t>(widest_coded_, 1) + GROUP - 1) / GROUP;
        codes_ = memory_for<int8_t>(product_of(rows, groups, GROUP));
        code_scales_ = memory_for<float>(product_of(rows, groups));
        code_sums_ = memory_for<float>(product_of(rows, groups));
        for (size_t i = 0; i < cosines_.size(); ++i)
            cosines_[i] = memory_for<float>(product_of(rows, 2, (int64_t)program.waves[i].rates.size()));
        make_room_for_chosen(rows);
        row_room_ = rows;
    }
    if (picked > picked_room_) {
        picked_room_ = 0;
        make(picked, false);
        picked_room_ = picked;
    }
    if (scratch_[0]) return;
    int64_t width = PANEL;
    for (const CacheShape& shape : program.caches) width = std::max(width, up_to(shape.width, PANEL));
    const int64_t numbers = product_of(PIECE, width + settings_.room + PANEL);
    for (auto& one : scratch_) one = memory_for<float>(numbers);
}

void State::advance(const Tokens& tokens, const Taker& take) {
    is_reading_ = false;
    check(tokens);
    for (int64_t i = 0; i < tokens.count; ++i) {
        Slot& slot = slots_[(size_t)tokens.slots[i]];
        if (looks_back_ && !slot.memory) refuse("slot %lld has read no text to look at", (long long)tokens.slots[i]);
        if (!slot.text) slot.text = store(text_cells_, text_scales_);
    }
    const int64_t some = slides_ ? settings_.at_once : tokens.count;
    make_room(std::min(some, tokens.count), std::min(some, tokens.wanted));
    for (int64_t begin = 0; begin < tokens.count; begin += some)
        run_piece(tokens, begin, std::min(begin + some, tokens.count), take);
}

// Run the program for the rows begin … end, and let their scores be taken.
void State::run_piece(const Tokens& tokens, int64_t begin, int64_t end, const Taker& take) {
    std::vector<int64_t> rows, into;
    for (int64_t i = 0; i < tokens.wanted; ++i)
        if (tokens.rows[i] >= begin && tokens.rows[i] < end) rows.push_back(tokens.rows[i] - begin), into.push_back(i);
    std::vector<int64_t> ends((size_t)settings_.slots, -1);
    for (int64_t i = end - 1; slides_ && i >= begin; --i) {
        int64_t& last = ends[(size_t)tokens.slots[i]];
        if (last < 0) last = tokens.places[i] + 1;
    }
    for (int64_t i = begin; slides_ && i < end; ++i) {
        int64_t& last = ends[(size_t)tokens.slots[i]];
        if (last >= 0) slide(*slots_[(size_t)tokens.slots[i]].text, tokens.places[i], last);
        last = -1;
    }
    run(write_, Tokens{end - begin, tokens.ids + begin, tokens.slots + begin, tokens.places + begin, (int64_t)rows.size(), rows.data()});
    for (int64_t i = begin; i < end; ++i) {
        Store& text = *slots_[(size_t)tokens.slots[i]].text;
        text.length = tokens.places[i] + 1, text.touched = std::max(text.touched, text.length);
    }
    take(into);
}

void State::step(const Tokens& tokens, float* scores) {
    const int64_t vocabulary = model_.program.vocabulary;
    advance(tokens, [&](const std::vector<int64_t>& into) {
        for (size_t i = 0; i < into.size(); ++i)
            std::memcpy(scores + into[i] * vocabulary, row_of(model_.program.scores, (int64_t)i), (size_t)vocabulary * sizeof(float));
    });
}

void State::best(const Tokens& tokens, const Choice& choice, float* likely, int64_t* ids) {
    const int64_t count = choice.count, vocabulary = model_.program.vocabulary;
    if (count < 1 || count > vocabulary) refuse("of %lld tokens, %lld are asked for", (long long)vocabulary, (long long)count);
    advance(tokens, [&](const std::vector<int64_t>& into) {
        std::atomic<int64_t> next{0};
        pool_.run([&](int thread) {
            for (int64_t row; (row = next.fetch_add(1)) < (int64_t)into.size();) {
                const int64_t at = into[(size_t)row] * count;
                best_of(row_of(model_.program.scores, row), choice, likely + at, ids + at, thread);
            }
        });
    });
}

void State::best_of(const float* scores, const Choice& choice, float* likely, int64_t* ids, int thread) {
    const int64_t count = model_.program.vocabulary;
    std::vector<float>& most = scans_[(size_t)thread];
    const float largest = kernels_.largest(scores, count, most.data());
    int64_t found = 0;
    for (size_t block = 0; block < most.size(); ++block) {
        if (found == choice.count && !(most[block] > likely[found - 1])) continue;
        const int64_t end = std::min(count, ((int64_t)block + 1) * SCAN);
        for (int64_t i = (int64_t)block * SCAN; i < end; ++i) {
            if (!(scores[i] > (found == choice.count ? likely[found - 1] : -INFINITY))) continue;
            if (std::binary_search(choice.forbidden, choice.forbidden + choice.barred, i)) continue;
            if (found < choice.count) ++found;
            int64_t place = found - 1;
            for (; place > 0 && likely[place - 1] < scores[i]; --place) likely[place] = likely[place - 1], ids[place] = ids[place - 1];
            likely[place] = scores[i], ids[place] = i;
        }
    }
    const float normaliser = largest + (float)std::log(kernels_.exponentials(scores, count, largest));
    for (int64_t i = 0; i < found; ++i) likely[i] -= normaliser;
    std::fill(likely + found, likely + choice.count, std::isnan(largest) ? NAN : -INFINITY);
    std::fill(ids + found, ids + choice.count, 0);
}

void State::read(int64_t count, const int64_t* ids, const int64_t* slots) {
    if (read_.empty()) refuse("this program reads no text beside the one that it writes");
    if (count < 1 || count > MOST_ROWS) refuse("1 to %lld tokens are read at once", (long long)MOST_ROWS);
    std::vector<int64_t> places((size_t)count), starts;
    texts_.resize((size_t)count);
    for (int64_t i = 0; i < count; ++i) {
        length(slots[i]);
        if (!i || slots[i] != slots[i - 1]) starts.push_back(i);
        places[(size_t)i] = i - starts.back(), texts_[(size_t)i] = (int64_t)starts.size() - 1;
    }
    const Tokens tokens{count, ids, slots, places.data(), 0, nullptr};
    is_reading_ = true;
    check(tokens);
    while (transient_.size() < starts.size()) transient_.push_back(store(reading_cells_, reading_scales_));
    make_room(count, 0);
    std::vector<Slot> fresh(starts.size());
    for (size_t i = 0; i < starts.size(); ++i) {
        const int64_t long_is = (i + 1 < starts.size() ? starts[i + 1] : count) - starts[i];
        fresh[i].memory = store(memory_cells_, memory_scales_);
        fresh[i].memory->length = fresh[i].memory->touched = long_is;
        transient_[i]->length = long_is, transient_[i]->touched = std::max(transient_[i]->touched, long_is);
    }
    for (size_t i = 0; i < starts.size(); ++i) slots_[(size_t)slots[starts[i]]] = fresh[i];
    run(read_, tokens);
}

void State::run(const std::vector<Phase>& phases, const Tokens& tokens) {
    tokens_ = tokens;
    for (size_t i = 0; i < phases.size(); ++i) {
        const Instruction* one = phases[i].all;
        if (!one) {
            const int64_t rows = rows_of(phases[i]), piece = rows_at_once(rows);
            counts_[i] = (rows + piece - 1) / piece;
        } else if (one->code == MULTIPLY) {
            const int64_t blocks = blocks_of(*one), piece = blocks_at_once(blocks);
            counts_[i] = (blocks + piece - 1) / piece;
        } else if (one->code == CHOOSE_EXPERTS) {
            counts_[i] = 1;
        } else if (one->code == MULTIPLY_CHOSEN) {
            counts_[i] = experts_at_once(*one) * pieces_of_chosen(*one);
        } else {
            pieces_of(*one, pieces_[i]);
            counts_[i] = (int64_t)pieces_[i].size();
        }
    }
    turns_.begin();
    pool_.run([&](int thread) { work(phases, thread); });
}

int64_t State::rows_of(const Phase& phase) const { return phase.picked ? tokens_.wanted : tokens_.count; }

// Rows that a thread takes at a time.
int64_t State::rows_at_once(int64_t rows) const { return std::max<int64_t>(1, rows / (4 * settings_.threads)); }

// Blocks of 16 outputs that a thread takes at a time.
int64_t State::blocks_at_once(int64_t blocks) const { return std::max<int64_t>(1, blocks / (8 * settings_.threads)); }

int64_t State::blocks_of(const Instruction& one) const {
    int64_t blocks = 0;
    for (const Product& product : one.products) blocks += model_.matrices[(size_t)product.matrix].blocks;
    return blocks;
}

void State::work(const std::vector<Phase>& phases, int thread) {
    Ahead ahead;
    for (size_t i = 0, last; i < phases.size() && counts_[i]; i = last + 1) {
        // What is done row by row in one piece is left to whoever ends what is before it: one wait less.
        for (last = i; last + 1 < phases.size() && !phases[last + 1].all && counts_[last + 1] == 1;) ++last;
        const auto close = [&] {
            for (size_t k = i + 1; k <= last; ++k) part(phases[k], k, 0, thread);
        };
        const auto one = [&](int64_t piece) { part(phases[i], i, piece, thread); };
        turns_.work((uint32_t)i + 1, counts_[i], thread, one, close, [&] { fetch(phases, last, thread, ahead); });
    }
}

// A piece of a phase's work.
void State::part(const Phase& phase, size_t number, int64_t piece, int thread) {
    if (!phase.all) {
        const int64_t rows = rows_of(phase), first = piece * rows_at_once(rows), end = std::min(rows, first + rows_at_once(rows));
        if (!number) make_waves(first, end);
        row_by_row(phase, first, end);
    } else if (phase.all->code == MULTIPLY) {
        const int64_t some = blocks_at_once(blocks_of(*phase.all));
        products(phase, piece * some, some);
    } else if (phase.all->code == CHOOSE_EXPERTS) {
        choose(*phase.all);
    } else if (phase.all->code == MULTIPLY_CHOSEN) {
        products_of_chosen(*phase.all, piece);
    } else {
        look(*phase.all, pieces_[number][(size_t)piece], thread);
    }
}

// The cosines and sines of the rows' places, for all layers.
void State::make_waves(int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) {
        for (size_t i = 0; i < cosines_.size(); ++i) {
            const Waves& waves = model_.program.waves[i];
            const int64_t pairs = (int64_t)waves.rates.size();
            float* cosines = cosines_[i].get() + row * 2 * pairs;
            for (int64_t k = 0; k < pairs; ++k) {
                const float angle = (float)tokens_.places[row] * waves.rates[(size_t)k];
                cosines[k] = std::cos(angle) * waves.strength;
                cosines[pairs + k] = std::sin(angle) * waves.strength;
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------
// What is done row by row

float* State::row_of(int32_t number, int64_t row) const { return registers_[(size_t)number].get() + row * wide(number); }

void State::row_by_row(const Phase& phase, int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) {
        for (const Instruction* one : phase.rows) one_row(*one, row);
        if (phase.quantised_for) quantise(*phase.quantised_for, row);
    }
}

void State::one_row(const Instruction& one, int64_t row) {
    const int64_t width = one.out < 0 ? 0 : wide(one.out);
    float* out = one.out < 0 ? nullptr : row_of(one.out, row);
    const float* x = one.x < 0 || one.code == PICK_ROWS ? nullptr : row_of(one.x, row);
    const auto vector = [&](int32_t number) { return number < 0 ? nullptr : model_.vectors[(size_t)number].data(); };
    switch (one.code) {
        case TAKE_TOKENS:
            model_.matrices[(size_t)one.weight].row(tokens_.ids[row], out);
            for (int64_t i = 0; i < width; ++i) out[i] *= one.scale;
            break;
        case ADD_PLACES: {
            const int64_t place = tokens_.places[row] + one.offset;
            const float* table = (const float*)model_.matrices[(size_t)one.weight].block(place / BLOCK) + place % BLOCK;
            for (int64_t i = 0; i < width; ++i) out[i] = x[i] + table[i * BLOCK];
            break;
        }
        case NORM_ROWS:
            for (int64_t i = 0; i < width; i += one.width)
                kernels_.norm(x + i, out + i, one.width, vector(one.weight), vector(one.bias), one.eps, one.scale, one.choice == 0);
            break;
        case ROTATE: turn(one, row); break;
        case REMEMBER: remember(one, row); break;
        case APPLY: kernels_.apply(one.choice, x, nullptr, out, width); break;
        case GATE: kernels_.apply(one.choice, x, row_of(one.y, row), out, width); break;
        case ADD_ROWS: {
            const float* y = row_of(one.y, row);
            for (int64_t i = 0; i < width; ++i) out[i] = x[i] + y[i];
            break;
        }
        case SCALE_ROWS:
            for (int64_t i = 0; i < width; ++i) out[i] = x[i] * one.scale;
            break;
        case CLIP_ROWS:
            for (int64_t i = 0; i < width; ++i) out[i] = std::min(std::max(x[i], -one.cap), one.cap);
            break;
        case CAP_ROWS:
            for (int64_t i = 0; i < width; ++i) out[i] = std::tanh(x[i] / one.cap) * one.cap;
            break;
        case BLEND_CHOSEN: blend(one, row); break;
        case DAMP_ROWS: {
            const float by = 1 / (1 + std::exp(-*row_of(one.y, row)));
            for (int64_t i = 0; i < width; ++i) out[i] = x[i] * by;
            break;
        }
        case PICK_ROWS: std::memcpy(out, row_of(one.x, tokens_.rows[row]), (size_t)width * sizeof(float)); break;
        default: break;
    }
}

void State::turn(const Instruction& one, int64_t row) {
    const int64_t pairs = (int64_t)model_.program.waves[(size_t)one.number].rates.size(), width = wide(one.x) / one.heads;
    const float *cosines = cosines_[(size_t)one.number].get() + row * 2 * pairs, *sines = cosines + pairs;
    const float* x = row_of(one.x, row);
    float* out = row_of(one.out, row);
    const int64_t apart = one.choice == 0 ? pairs : 1, step = one.choice == 0 ? 1 : 2;
    for (int64_t head = 0; head < one.heads; ++head, x += width, out += width) {
        for (int64_t i = 0; i < pairs; ++i) {
            const float first = x[i * step], second = x[i * step + apart];
            out[i * step] = first * cosines[i] - second * sines[i];
            out[i * step + apart] = second * cosines[i] + first * sines[i];
        }
        if (out != x) std::copy(x + 2 * pairs, x + width, out + 2 * pairs);
    }
}

const Place& State::place_of(const Instruction& one) const {
    const CacheShape& shape = model_.program.caches[(size_t)one.number];
    return (shape.memory ? memory_ : is_reading_ ? reading_ : text_)[(size_t)one.number];
}

Store& State::store_of(const Instruction& one, int64_t row) const {
    if (model_.program.caches[(size_t)one.number].memory) return *slots_[(size_t)tokens_.slots[row]].memory;
    return is_reading_ ? *transient_[(size_t)texts_[(size_t)row]] : *slots_[(size_t)tokens_.slots[row]].text;
}

void State::remember(const Instruction& one, int64_t row) {
    const CacheShape& shape = model_.program.caches[(size_t)one.number];
    const Place& place = place_of(one);
    Store& store = store_of(one, row);
    const int64_t token = tokens_.places[row] - store.first[(size_t)one.number], room = place.room;
    const int64_t padded = up_to(shape.width, PANEL);
    for (int64_t group = 0; group < shape.groups; ++group) {
        const float *key = row_of(one.x, row) + group * shape.width, *value = row_of(one.y, row) + group * shape.width;
        const int64_t keys = place.keys + (group * room + token / PANEL * PANEL) * shape.width + token % PANEL;
        const int64_t values = place.values + (group * room + token) * padded;
        float key_by = 1, value_by = 1;
        if (settings_.cell == CELL_I8) {
            float most_key = 0, most_value = 0;
            for (int64_t i = 0; i < shape.width; ++i)
                most_key = std::max(most_key, std::fabs(key[i])), most_value = std::max(most_value, std::fabs(value[i]));
            store.scales[place.key_scales + group * room + token] = most_key / 127;
            store.scales[place.value_scales + group * room + token] = most_value / 127;
            key_by = most_key > 0 ? 127 / most_key : 0, value_by = most_value > 0 ? 127 / most_value : 0;
        }
        for (int64_t i = 0; i < shape.width; ++i) {
            if (settings_.cell == CELL_F32) {
                ((float*)store.cells.get())[keys + i * PANEL] = key[i];
                ((float*)store.cells.get())[values + i] = value[i];
            } else if (settings_.cell == CELL_F16) {
                ((uint16_t*)store.cells.get())[keys + i * PANEL] = narrowed(key[i]);
                ((uint16_t*)store.cells.get())[values + i] = narrowed(value[i]);
            } else {
                ((int8_t*)store.cells.get())[keys + i * PANEL] = code_of(key[i] * key_by);
                ((int8_t*)store.cells.get())[values + i] = code_of(value[i] * value_by);
            }
        }
    }
}

void State::quantise(const Instruction& one, int64_t row) {
    if (one.code == MULTIPLY_CHOSEN) return gather(one, row);
    const int64_t width = wide(one.x), groups = (width + GROUP - 1) / GROUP;
    kernels_.quantise(row_of(one.x, row), width, groups, codes_.get() + row * groups * GROUP,
                      code_scales_.get() + row * groups, code_sums_.get() + row * groups);
}

// ---------------------------------------------------------------------------------------------------------------
// Products: blocks of 16 outputs, which threads take in pieces as they come to them

void State::products(const Phase& phase, int64_t begin, int64_t count) {
    const Instruction& one = *phase.all;
    const int64_t rows = rows_of(phase), width = wide(one.x);
    bool floats = false;
    for (const Product& product : one.products) floats |= model_.matrices[(size_t)product.matrix].kind == F32;
    const Operand x{row_of(one.x, 0), width, codes_.get(), code_scales_.get(), code_sums_.get(), (width + GROUP - 1) / GROUP};
    // Rows that stay in a core's cache while a piece of the matrix goes by
    const int64_t some = std::max<int64_t>(24, ((int64_t)192 << 10) / (width * (floats ? 4 : 1)) / 24 * 24);
    for (int64_t row = 0; row < rows; row += some) {
        int64_t before = 0;
        for (const Product& product : one.products) {
            const Matrix& matrix = model_.matrices[(size_t)product.matrix];
            const int64_t from = std::max<int64_t>(begin - before, 0), end = std::min(begin + count - before, matrix.blocks);
            const float* bias = product.bias < 0 ? nullptr : model_.vectors[(size_t)product.bias].data();
            for (int64_t block = from; block < end; ++block) {
                const Target target{bias ? bias + block * BLOCK : nullptr, row_of(product.out, 0) + block * BLOCK,
                                    wide(product.out), std::min(BLOCK, matrix.rows - block * BLOCK)};
                kernels_.product[matrix.kind](matrix.block(block), x, row, std::min(some, rows - row), target);
            }
            before += matrix.blocks;
        }
    }
}

}  // namespace polyformer
