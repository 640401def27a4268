// What threads do while they wait for others: fetch into their caches what they will read next. A step of few rows is as
// quick as its matrices come from memory, which would have nothing to do while one thread norms a row.

#include <algorithm>

#include "run.h"

namespace polyformer {

namespace {

// More rows than these are held up by arithmetic. More bytes than these would push each other out of a core's cache.
constexpr int64_t FEW_ROWS = 8, MOST_BYTES = (int64_t)96 << 10, LINE = 64, LINES_AT_ONCE = 4;

}  // namespace

void State::fetch(const std::vector<Phase>& phases, size_t done, int thread, Ahead& ahead) const {
    if (tokens_.count > FEW_ROWS) return;
    for (int64_t n = 0; n < LINES_AT_ONCE; ++n) {
        while (ahead.phase <= done || ahead.bytes.empty())
            if (!look_ahead(phases, done, thread, ahead)) return;
        auto& [at, left] = ahead.bytes.back();
        __builtin_prefetch(at, 0, 2);
        at += LINE, left -= LINE;
        if (left <= 0) ahead.bytes.pop_back();
    }
}

// Find what the thread's share of the next phase, or of the one behind that, reads first.
bool State::look_ahead(const std::vector<Phase>& phases, size_t done, int thread, Ahead& ahead) const {
    size_t next = std::max(ahead.phase, done) + 1, between = 0;
    for (size_t i = done + 1; i < next; ++i) between += i < phases.size() && phases[i].all;
    while (next < phases.size() && !phases[next].all) ++next;
    if (next >= phases.size() || between > 1) return false;
    ahead.phase = next;
    ahead.bytes.clear();
    const Instruction& one = *phases[next].all;
    const int64_t first = counts_[next] * thread / settings_.threads, end = counts_[next] * (thread + 1) / settings_.threads;
    if (one.code == MULTIPLY) {
        const int64_t some = blocks_at_once(blocks_of(one));
        int64_t begin = first * some, count = (end - first) * some;
        for (const Product& product : one.products) {
            const Matrix& matrix = model_.matrices[(size_t)product.matrix];
            if (begin < matrix.blocks) {
                const int64_t bytes = std::min(count, matrix.blocks - begin) * matrix.block_bytes;
                ahead.bytes.emplace_back(matrix.block(begin), std::min(bytes, MOST_BYTES));
                break;
            }
            begin -= matrix.blocks;
        }
        return true;
    }
    if (one.code != LOOK) return true;  // which experts' matrices are read isn't known yet
    const CacheShape& shape = model_.program.caches[(size_t)one.number];
    for (int64_t i = first; i < end; ++i) {
        const Piece& piece = pieces_[next][(size_t)i];
        const Place& place = place_of(one);
        const int64_t keys = std::min(keys_of(one, piece.row + piece.rows - 1), place.room), cell = bytes_of(settings_.cell);
        const uint8_t* cells = store_of(one, piece.row).cells.get();
        const int64_t group = piece.group * place.room, padded = up_to(shape.width, PANEL);
        ahead.bytes.emplace_back(cells + (place.values + group * padded) * cell, std::min(keys * padded * cell, MOST_BYTES / 8));
        ahead.bytes.emplace_back(cells + (place.keys + group * shape.width) * cell, std::min(keys * shape.width * cell, MOST_BYTES / 8));
    }
    return true;
}

}  // namespace polyformer
