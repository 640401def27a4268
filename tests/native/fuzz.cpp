// Runs programs that were changed at random, with weights and tokens at random, for as many rounds as are asked for.
// Built with the address and undefined-behaviour sanitizers, which end it at the first fault. Nothing that it is given
// may do more than be refused.
//
//   fuzz ROUNDS SEED FILE...      files of words, as `polyformer.native.words` makes them

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "../../polyformer/native/src/refused.h"
#include "../../polyformer/native/src/run.h"

using namespace polyformer;

namespace {

std::mt19937_64 chance;

int64_t below(int64_t n) { return (int64_t)(chance() % (uint64_t)n); }

std::vector<int64_t> words_in(const char* path) {
    std::ifstream file(path, std::ios::binary);
    const std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    std::vector<int64_t> words(bytes.size() / 8);
    memcpy(words.data(), bytes.data(), words.size() * 8);
    return words;
}

void change(std::vector<int64_t>& words) {
    for (int64_t n = below(4); n; --n) {
        int64_t& word = words[(size_t)below((int64_t)words.size())];
        switch (below(7)) {
            case 0: word += below(3) - 1; break;
            case 1: word = below(64); break;
            case 2: word = (int64_t)chance(); break;
            case 3: word = -1; break;
            case 4: word = words[(size_t)below((int64_t)words.size())]; break;
            case 5: word = (int64_t)1 << below(63); break;
            default: words.resize((size_t)below((int64_t)words.size()) + 1); return;
        }
    }
}

// A weight of random bytes in a random format; sometimes of the wrong size, or with rows that aren't there.
void give(Model& model, int64_t number) {
    const WeightShape& shape = model.program.weights[(size_t)number];
    static const struct { Source source; int64_t numbers, bytes; } formats[] = {
        {F32_GIVEN, 1, 4}, {F16_GIVEN, 1, 2}, {BF16_GIVEN, 1, 2}, {Q4_0, 32, 18}, {Q4_1, 32, 20}, {Q8_0, 32, 34}, {Q4_K, 256, 144}, {Q6_K, 256, 210}};
    auto format = formats[below(8)];
    if (shape.columns % format.numbers && below(1000)) format = formats[below(3)];
    if (shape.rows * shape.columns > 1 << 18) refuse("too much for this test");
    int64_t rows = shape.rows;
    std::vector<int64_t> order;
    if (!below(4)) {
        rows = 1 + below(2 * shape.rows);
        for (int64_t i = 0; i < shape.rows; ++i) order.push_back(below(3000) ? below(rows) : (int64_t)chance());
    }
    std::vector<uint8_t> bytes((size_t)(rows * shape.columns / format.numbers * format.bytes + (below(1000) ? 0 : 1)));
    const bool tame = below(3);
    for (uint8_t& byte : bytes) byte = (uint8_t)(tame ? below(60) : below(256));
    const Kind kind = below(3) ? F32 : (Kind)below(KINDS);
    model.give(number, kind, Given{format.source, bytes.data(), (int64_t)bytes.size(), rows, shape.columns, order.empty() ? nullptr : order.data()});
}

void steps(State& state, const Model& model, int64_t slots, int64_t room) {
    const int64_t known = model.program.tokens_written ? model.program.tokens_written : 8;
    for (int64_t n = 1 + below(5); n; --n) {
        const int64_t slot = below(40) ? below(slots) : -1 + below(slots + 2), start = slot >= 0 && slot < slots ? state.length(slot) : 0;
        std::vector<int64_t> ids, in, places, rows;
        for (int64_t i = 0, count = 1 + below(9); i < count; ++i) {
            ids.push_back(below(60) ? below(known) : -2 + below(known + 4));
            in.push_back(below(60) ? slot : below(slots));
            places.push_back(below(60) ? start + i : below(room + 2));
            if (below(2)) rows.push_back(i);
        }
        std::vector<float> scores(rows.size() * (size_t)model.program.vocabulary + 1);
        try {
            if (!model.program.read.empty()) state.read((int64_t)ids.size(), ids.data(), in.data());
        } catch (const Refused&) {
        }
        try {
            state.step(Tokens{(int64_t)ids.size(), ids.data(), in.data(), places.data(), (int64_t)rows.size(), rows.data()}, scores.data());
        } catch (const Refused&) {
        }
        try {
            const std::vector<int64_t> barred{below(known), known};
            const Choice choice{below(40) ? 1 + below(9) : (int64_t)chance(), below(3), barred.data()};
            const size_t room = (size_t)std::min<int64_t>(std::max<int64_t>(choice.count, 1), model.program.vocabulary) * rows.size() + 1;
            std::vector<float> likely(room);
            std::vector<int64_t> best(room);
            const int64_t begin = slot >= 0 && slot < slots ? state.length(slot) : 0;
            for (size_t i = 0; i < places.size(); ++i) places[i] = begin + (int64_t)i;
            state.best(Tokens{(int64_t)ids.size(), ids.data(), in.data(), places.data(), (int64_t)rows.size(), rows.data()}, choice, likely.data(), best.data());
        } catch (const Refused&) {
        }
        try {
            if (!below(3)) state.truncate(below(slots), below(room));
            if (!below(3)) state.copy(below(slots), below(slots), below(room));
            if (!below(5)) state.clear(below(slots + 1));
        } catch (const Refused&) {
        }
        state.bytes();
    }
}

}  // namespace

int main(int count, char** arguments) {
    if (count < 4) return 2;
    chance.seed((uint64_t)std::atoll(arguments[2]));
    int64_t ran = 0, refused = 0;
    for (int64_t round = std::atoll(arguments[1]); round; --round) {
        std::vector<int64_t> words = words_in(arguments[3 + below(count - 3)]);
        if (words.empty()) return 2;
        if (below(3)) change(words);
        try {
            Model model(decode(words.data(), (int64_t)words.size()));
            for (int64_t i = 0; i < (int64_t)model.program.weights.size(); ++i) give(model, i);
            int64_t widest = 0;
            for (const int64_t one : model.program.registers) widest = std::max(widest, one);
            if (widest > 1 << 16) refuse("too much for this test");
            const int64_t slots = 1 + below(3), room = 1 + below(100);
            const Settings settings{slots, (room + 15) / 16 * 16, (Cell)below(CELLS), 1 + (int)below(3), below(2) == 1, below(4), 1 + below(6)};
            State state(model, settings);
            steps(state, model, slots, room);
            ++ran;
        } catch (const Refused&) {
            ++refused;
        }
    }
    std::printf("%lld programs ran, %lld were refused\n", (long long)ran, (long long)refused);
    return ran && refused ? 0 : 3;
}
