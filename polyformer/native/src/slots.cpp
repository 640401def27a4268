// What sequences hold in their slots: where in memory their keys and values are, and how much of it they take.

#include <algorithm>
#include <cstdlib>
#include <cstring>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

#include "refused.h"
#include "run.h"

namespace polyformer {

constexpr int64_t PAGE = 4096;

std::vector<Place> State::layout(bool memory, bool reading, int64_t* cells, int64_t* scales) const {
    const Program& program = model_.program;
    std::vector<Place> found(program.caches.size());
    std::vector<bool> read(program.caches.size());
    for (const Instruction& one : program.read)
        if (one.code == REMEMBER || one.code == LOOK) read[(size_t)one.number] = true;
    for (size_t i = 0; i < found.size(); ++i) {
        const CacheShape& shape = program.caches[i];
        if (shape.memory != memory || (!memory && read[i] != reading)) continue;
        int64_t& room = found[i].room = settings_.room;
        if (shape.window && !memory && !reading) {
            const int64_t bounded = up_to(shape.window + settings_.retracts + settings_.at_once + PANEL, PANEL);
            if (bounded < room) room = bounded, found[i].window = shape.window;
        }
        found[i].keys = *cells;
        *cells += product_of(shape.groups, room, shape.width);
        found[i].values = *cells;
        *cells += product_of(shape.groups, room, up_to(shape.width, PANEL));
        if (settings_.cell == CELL_I8) {
            found[i].key_scales = *scales, found[i].value_scales = *scales + product_of(shape.groups, room);
            *scales += product_of(2, shape.groups, room);
        }
        product_of(*cells, 4);
    }
    return found;
}

std::shared_ptr<Store> State::store(int64_t cells, int64_t scales) const {
    auto found = std::make_shared<Store>();
    found->first.resize(model_.program.caches.size());
    // Large pieces come from the system as zeros and take no memory before they are written to.
    const int64_t bytes = product_of(cells, bytes_of(settings_.cell)), others = product_of(scales, 4);
    found->cells.reset((uint8_t*)std::calloc((size_t)bytes + 1, 1));
    found->scales.reset((float*)std::calloc((size_t)others + 1, 1));
    if (!found->cells || !found->scales) refuse("there is no memory for a cache of %lld bytes", (long long)(bytes + others));
#ifdef MADV_NOHUGEPAGE
    // On large pages, a short text would take the memory of a long one.
    const int64_t begin = up_to((int64_t)(intptr_t)found->cells.get(), PAGE) - (int64_t)(intptr_t)found->cells.get();
    if (bytes > 2 * PAGE) madvise(found->cells.get() + begin, (size_t)((bytes - begin) / PAGE * PAGE), MADV_NOHUGEPAGE);
#endif
    return found;
}

int64_t State::length(int64_t slot) const {
    if (slot < 0 || slot >= settings_.slots) refuse("there is no slot %lld; there are %lld", (long long)slot, (long long)settings_.slots);
    const Slot& one = slots_[(size_t)slot];
    return one.text ? one.text->length : 0;
}

int64_t State::earliest(int64_t slot) const {
    int64_t found = std::min<int64_t>(1, length(slot));
    const Slot& one = slots_[(size_t)slot];
    for (size_t i = 0; i < text_.size() && one.text; ++i)
        if (text_[i].window && one.text->first[i]) found = std::max(found, one.text->first[i] + text_[i].window - 1);
    return found;
}

void State::check_length(int64_t slot, int64_t length) const {
    if (length < 0 || length > this->length(slot)) refuse("slot %lld holds no %lld tokens", (long long)slot, (long long)length);
    if (length && length < earliest(slot))
        refuse("slot %lld has forgotten what a text of %lld tokens would look at next", (long long)slot, (long long)length);
}

void State::truncate(int64_t slot, int64_t length) {
    check_length(slot, length);
    Store* text = slots_[(size_t)slot].text.get();
    if (text) text->length = length;
    if (text && !length) std::fill(text->first.begin(), text->first.end(), 0);
}

// Of what lies before windows, forget as much as there is no room for beside the tokens begin … end.
void State::slide(Store& text, int64_t begin, int64_t end) const {
    const int64_t cell = bytes_of(settings_.cell);
    for (size_t i = 0; i < text_.size(); ++i) {
        const Place& place = text_[i];
        if (!place.window) continue;
        int64_t& first = text.first[i];
        if (!begin) first = 0;
        if (end - first <= place.room) continue;
        const int64_t next = (begin - place.window + 1 - settings_.retracts) / PANEL * PANEL, gone = next - first;
        const int64_t held = up_to(begin - next, PANEL), wide = up_to(model_.program.caches[i].width, PANEL);
        first = next;
        for (int64_t group = 0; group < model_.program.caches[i].groups; ++group) {
            for (const auto& [from, width] : {std::pair{place.keys, model_.program.caches[i].width}, {place.values, wide}}) {
                uint8_t* cells = text.cells.get() + (from + group * place.room * width) * cell;
                std::memmove(cells, cells + gone * width * cell, (size_t)(held * width * cell));
            }
            for (const int64_t from : {place.key_scales, place.value_scales}) {
                float* scales = text.scales.get() + from + group * place.room;
                if (settings_.cell == CELL_I8) std::memmove(scales, scales + gone, (size_t)held * sizeof(float));
            }
        }
    }
}

void State::clear(int64_t slot) {
    length(slot);
    slots_[(size_t)slot] = Slot{};
}

void State::copy(int64_t source, int64_t target, int64_t length) {
    check_length(source, length);
    this->length(target);
    if (source == target) return truncate(source, length);
    const Slot& from = slots_[(size_t)source];
    Slot& to = slots_[(size_t)target];
    to.memory = from.memory;
    if (!to.text && length) to.text = store(text_cells_, text_scales_);
    if (to.text) to.text->length = length, to.text->touched = std::max(to.text->touched, length);
    const int64_t cell = bytes_of(settings_.cell);
    for (size_t i = 0; i < text_.size() && length; ++i) {
        const Place& place = text_[i];
        if (place.keys < 0) continue;
        const int64_t first = to.text->first[i] = from.text->first[i];
        const int64_t room = place.room, count = length - first, held = up_to(count, PANEL);
        const CacheShape& shape = model_.program.caches[i];
        const int64_t value = up_to(shape.width, PANEL);
        for (int64_t group = 0; group < shape.groups; ++group) {
            const int64_t keys = (place.keys + group * room * shape.width) * cell;
            const int64_t values = (place.values + group * room * value) * cell;
            std::memcpy(to.text->cells.get() + keys, from.text->cells.get() + keys, (size_t)(held * shape.width * cell));
            std::memcpy(to.text->cells.get() + values, from.text->cells.get() + values, (size_t)(count * value * cell));
            if (settings_.cell != CELL_I8) continue;
            for (const int64_t scales : {place.key_scales + group * room, place.value_scales + group * room})
                std::copy_n(from.text->scales.get() + scales, count, to.text->scales.get() + scales);
        }
    }
}

int64_t State::bytes_for(const std::vector<Place>& layout, int64_t tokens) const {
    const int64_t cell = bytes_of(settings_.cell);
    int64_t total = 0;
    for (size_t i = 0; i < layout.size(); ++i) {
        if (layout[i].keys < 0) continue;
        const CacheShape& shape = model_.program.caches[i];
        for (const int64_t width : {shape.width, up_to(shape.width, PANEL)})
            total += shape.groups * up_to(std::min(tokens, layout[i].room) * width * cell, PAGE);
        if (settings_.cell == CELL_I8) total += 2 * shape.groups * layout[i].room * 4;
    }
    return total;
}

int64_t State::bytes_for(int64_t tokens, int64_t source) const {
    return bytes_for(text_, tokens) + bytes_for(memory_, source);
}

int64_t State::bytes() const {
    int64_t total = 0;
    for (const auto& one : transient_) total += bytes_for(reading_, one->touched);
    std::vector<const Store*> seen;
    for (const Slot& slot : slots_) {
        if (slot.text) total += bytes_for(text_, slot.text->touched);
        if (slot.memory && std::find(seen.begin(), seen.end(), slot.memory.get()) == seen.end()) {
            total += bytes_for(memory_, slot.memory->touched);
            seen.push_back(slot.memory.get());
        }
    }
    return total;
}

}  // namespace polyformer
