// What all levels of a plan file share.

#include "stored.h"

namespace dsr {

namespace {

// Marks the active entries of distances, where 255 means 255 inactive entries, and no active one. A bit for each entry,
// the first one highest.
bool to_bits(StoredWeight& stored, Problem& problem) {
    if (stored.form != DISTANCES || stored.weight.bits) return true;
    const int64_t size = stored.weight.size;
    if (!stored.bits.make((size + 7) / 8, problem)) return false;
    int64_t at = -1, found = 0;
    for (int64_t i = 0; i < stored.distance_bytes; i++) {
        const uint8_t distance = stored.distances[i];
        at += distance == 255 ? 255 : distance + 1;
        if (at >= size) break;
        if (distance == 255) continue;
        stored.bits[at >> 3] |= 128 >> (at & 7);
        found++;
    }
    if (at >= size || found != stored.weight.active)
        return problem.say("the plan is damaged: a mask does not fit; export it again.");
    stored.weight.bits = stored.bits.data;
    return true;
}

}  // namespace

bool Stored::read(Reader& file) { return read_head(file) && read_weights(file) && read_tables(file); }

bool Stored::read_values(Reader& file, Array<Value>& values) {
    if (!values.make(file.count(24), problem)) return false;
    for (Value& value : values) {
        value.name = file.string();
        value.rank = file.word_in(1, MAX_RANK);
        value.entries = 1;
        for (int64_t axis = 0; axis < value.rank; axis++) {
            value.shape[axis] = file.word_in(1, INT64_C(1) << 40);
            if (__builtin_mul_overflow(value.entries, value.shape[axis], &value.entries)) file.failed = true;
        }
    }
    return !file.failed || damaged("an input or output is out of range");
}

// What names point to is copied, since the bytes of the file are not kept.
bool Stored::read_head(Reader& file) {
    const int64_t size = file.word();
    const void* bytes = file.block(size);
    if (!bytes) return damaged("its texts are cut off");
    if (!plan.head.make(size, problem)) return false;
    memcpy(plan.head.data, bytes, size);
    Reader own(plan.head.data, size);
    if (!plan.texts.make(own.count(24), problem)) return false;
    for (Text& text : plan.texts) text = {own.string(), own.string()};
    if (own.failed) return damaged("a text is cut off");
    return read_values(own, plan.inputs) && read_values(own, plan.outputs);
}

bool Stored::read_weights(Reader& file) {
    if (!weights.make(file.count(48), problem)) return false;
    for (StoredWeight& stored : weights) {
        Weight& weight = stored.weight;
        stored.form = file.word_in(FULL, DISTANCES);
        weight.width = file.word_in(1, 4);
        weight.size = file.word_in(1, INT32_MAX);
        weight.active = file.word_in(0, weight.size);
        stored.distance_bytes = file.word();
        const void* mask = file.block(stored.distance_bytes);
        weight.values = file.block(weight.active * weight.width);
        if (file.failed) return damaged("a weight is cut off");
        if (stored.form == BITS) weight.bits = (const uint8_t*)mask;
        if (stored.form == BITS && stored.distance_bytes != (weight.size + 7) / 8)
            return damaged("a mask is cut off");
        if (stored.form == FULL && weight.active != weight.size) return damaged("a weight lacks entries");
        stored.distances = (const uint8_t*)mask;
    }
    return true;
}

bool Stored::read_tables(Reader& file) {
    if (!tables.make(file.count(16), problem)) return false;
    if (!plan.tables.make(tables.count, problem)) return false;
    for (StoredTable& table : tables) {
        table.type = file.word_in(FLOATS, INT64S);
        table.count = file.word_in(0, INT64_C(1) << 40);
        table.data = file.block(table.count * (table.type == INT64S ? 8 : 4));
    }
    return !file.failed || damaged("a table is cut off");
}

const Weight* Stored::weight(int64_t number) {
    return to_bits(weights[number], problem) ? &weights[number].weight : nullptr;
}

const void* Stored::table(int64_t number, int64_t type) {
    if (number < 0 || number >= tables.count || tables[number].type != type)
        return damaged("an op names a table that is not there"), nullptr;
    const StoredTable& stored = tables[number];
    Array<uint8_t>& own = plan.tables[number];
    const int64_t nbytes = stored.count * (type == INT64S ? 8 : 4);
    if (!own.data) {
        if (!own.make(nbytes + (int64_t)sizeof(TableHead), problem)) return nullptr;
        const TableHead head = {stored.count, type};
        memcpy(own.data, &head, sizeof head);
        memcpy(own.data + sizeof head, stored.data, nbytes);
    }
    return own.data + sizeof(TableHead);
}

}  // namespace dsr
