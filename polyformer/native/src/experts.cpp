// Mixture of experts: which experts rows go to, and products with the matrices of those alone. Rows are gathered by
// expert, so that each matrix is read once for all of its rows.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "refused.h"
#include "run.h"

namespace polyformer {

void State::make_room_for_chosen(int64_t rows) {
    const Program& program = model_.program;
    for (size_t i = 0; i < chosen_.size(); ++i) {
        const ExpertChoice& shape = program.choices[i];
        const size_t places = (size_t)product_of(rows, shape.chosen);
        for (auto* one : {&chosen_[i].experts, &chosen_[i].places, &chosen_[i].rows}) one->assign(places, 0);
        chosen_[i].starts.assign((size_t)shape.experts + 1, 0);
    }
    int64_t floats = 0, groups = 0;
    for (const auto* part : {&program.write, &program.read}) {
        for (const Instruction& one : *part) {
            if (one.code != MULTIPLY_CHOSEN) continue;
            const int64_t places = product_of(rows, program.choices[(size_t)one.number].chosen);
            groups = std::max(groups, product_of(places, (one.width + GROUP - 1) / GROUP));
            if (!one.choice) floats = std::max(floats, product_of(places, one.width));
        }
    }
    gathered_ = memory_for<float>(floats + 2 * BLOCK);
    gathered_codes_ = memory_for<int8_t>(product_of(groups, GROUP) + BLOCK);
    gathered_scales_ = memory_for<float>(groups + BLOCK);
    gathered_sums_ = memory_for<float>(groups + BLOCK);
}

// For all rows at once, as experts' places depend on all of them.
void State::choose(const Instruction& one) {
    Chosen& chosen = chosen_[(size_t)one.number];
    const ExpertChoice& shape = model_.program.choices[(size_t)one.number];
    const int64_t places = tokens_.count * shape.chosen;
    if (one.capacity) chosen.taken.assign((size_t)(settings_.slots * shape.experts), 0);
    std::fill(chosen.starts.begin(), chosen.starts.end(), 0);
    for (int64_t row = 0; row < tokens_.count; ++row) choose_for(one, row, chosen);
    for (int64_t i = 0; i < places; ++i) ++chosen.starts[(size_t)chosen.experts[(size_t)i] + 1];
    chosen.active.clear();
    for (int64_t expert = 0; expert < shape.experts; ++expert) {
        if (chosen.starts[(size_t)expert + 1]) chosen.active.push_back((int32_t)expert);
        chosen.starts[(size_t)expert + 1] += chosen.starts[(size_t)expert];
    }
    std::vector<int64_t> next(chosen.starts.begin(), chosen.starts.end() - 1);
    for (int64_t i = 0; i < places; ++i) {
        const int64_t place = next[(size_t)chosen.experts[(size_t)i]]++;
        chosen.places[(size_t)i] = (int32_t)place, chosen.rows[(size_t)place] = (int32_t)(i / shape.chosen);
    }
}

// The best experts of a row, the first of those with equal scores; and their weights.
void State::choose_for(const Instruction& one, int64_t row, Chosen& chosen) {
    const ExpertChoice& shape = model_.program.choices[(size_t)one.number];
    const float* scores = row_of(one.x, row);
    float* shares = row_of(one.out, row);
    int32_t* experts = chosen.experts.data() + row * shape.chosen;
    for (int64_t i = 0; i < shape.chosen; ++i) {
        int64_t best = -1;
        for (int64_t expert = 0; expert < shape.experts; ++expert) {
            if (std::find(experts, experts + i, (int32_t)expert) != experts + i) continue;
            if (best < 0 || scores[expert] > scores[best]) best = expert;
        }
        experts[i] = (int32_t)best;
    }
    float total = 0;
    if (one.choice == 0)
        for (int64_t expert = 0; expert < shape.experts; ++expert) total += std::exp(scores[expert] - scores[experts[0]]);
    for (int64_t i = 0; i < shape.chosen; ++i) {
        shares[i] = std::exp(scores[experts[i]] - scores[experts[0]]);
        if (one.choice == 1) total += shares[i];
    }
    for (int64_t i = 0; i < shape.chosen; ++i) {
        shares[i] /= total;
        if (!one.capacity) continue;
        int32_t& taken = chosen.taken[(size_t)(tokens_.slots[row] * shape.experts + experts[i])];
        if (++taken > one.capacity) shares[i] = 0;
    }
}

// What goes into the products, in the order of the experts.
void State::gather(const Instruction& one, int64_t row) {
    const Chosen& chosen = chosen_[(size_t)one.number];
    const int64_t count = model_.program.choices[(size_t)one.number].chosen, groups = (one.width + GROUP - 1) / GROUP;
    bool floats = false, codes = false;
    for (const Product& product : one.products)
        (model_.matrices[(size_t)product.matrix].kind == F32 ? floats : codes) = true;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t place = one.choice ? row * count + i : chosen.places[(size_t)(row * count + i)];
        const float* x = row_of(one.x, row) + (one.choice ? i * one.width : 0);
        if (floats && !one.choice) std::memcpy(gathered_.get() + place * one.width, x, (size_t)one.width * sizeof(float));
        if (codes)
            kernels_.quantise(x, one.width, groups, gathered_codes_.get() + place * groups * GROUP,
                              gathered_scales_.get() + place * groups, gathered_sums_.get() + place * groups);
    }
}

// The most experts that a step's rows may go to.
int64_t State::experts_at_once(const Instruction& one) const {
    const ExpertChoice& shape = model_.program.choices[(size_t)one.number];
    return std::min(shape.experts, tokens_.count * shape.chosen);
}

// Into how many pieces the products with an expert's matrices are cut.
int64_t State::pieces_of_chosen(const Instruction& one) const {
    int64_t blocks = 0;
    for (size_t i = 0; i < one.products.size(); i += (size_t)model_.program.choices[(size_t)one.number].experts)
        blocks += model_.matrices[(size_t)one.products[i].matrix].blocks;
    return std::min(blocks, (8 * settings_.threads + experts_at_once(one) - 1) / experts_at_once(one));
}

void State::products_of_chosen(const Instruction& one, int64_t piece) {
    const Chosen& chosen = chosen_[(size_t)one.number];
    const int64_t pieces = pieces_of_chosen(one), experts = model_.program.choices[(size_t)one.number].experts;
    if (piece / pieces >= (int64_t)chosen.active.size()) return;
    const int64_t expert = chosen.active[(size_t)(piece / pieces)], part = piece % pieces;
    const int64_t first = chosen.starts[(size_t)expert], end = chosen.starts[(size_t)expert + 1];
    const float* rows = one.choice ? row_of(one.x, 0) : gathered_.get();
    const Operand x{rows, one.width, gathered_codes_.get(), gathered_scales_.get(), gathered_sums_.get(), (one.width + GROUP - 1) / GROUP};
    for (size_t i = (size_t)expert; i < one.products.size(); i += (size_t)experts) {
        const Product& product = one.products[i];
        const Matrix& matrix = model_.matrices[(size_t)product.matrix];
        const float* bias = product.bias < 0 ? nullptr : model_.vectors[(size_t)product.bias].data();
        for (int64_t block = matrix.blocks * part / pieces; block < matrix.blocks * (part + 1) / pieces; ++block) {
            const Target target{bias ? bias + block * BLOCK : nullptr, row_of(product.out, 0) + block * BLOCK, matrix.rows,
                                std::min(BLOCK, matrix.rows - block * BLOCK)};
            kernels_.product[matrix.kind](matrix.block(block), x, first, end - first, target);
        }
    }
}

void State::blend(const Instruction& one, int64_t row) {
    const Chosen& chosen = chosen_[(size_t)one.number];
    const int64_t count = model_.program.choices[(size_t)one.number].chosen, width = wide(one.out);
    const float* shares = row_of(one.y, row);
    float* out = row_of(one.out, row);
    for (int64_t i = 0; i < count; ++i) {
        const float* x = row_of(one.x, 0) + (int64_t)chosen.places[(size_t)(row * count + i)] * width;
        for (int64_t k = 0; k < width; ++k) out[k] = (i ? out[k] : 0) + shares[i] * x[k];
    }
}

}  // namespace polyformer
