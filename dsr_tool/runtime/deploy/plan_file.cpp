// Reading a plan file: the head with its checksum, what all levels share, and then the level that is used.

#include "plan_file.h"

#include "../kernels/layout.h"
#include "check.h"
#include "checksum.h"
#include "pointers.h"
#include "reader.h"
#include "stored.h"

namespace dsr {

namespace {

constexpr char MAGIC[8] = {'\x89', 'D', 'S', 'R', 'P', 'L', 'A', 'N'};
constexpr int64_t VERSION = 1;
constexpr int64_t HEAD_BYTES = 48;

#define ABI(number) constexpr int64_t INTERFACE = number;
#include "../kernels/ops.def"

// The sum of the checksums of all rows of the layout, so that their order does not matter.
uint32_t layout_digest() {
    uint32_t digest = 0;
    for (const LayoutRow* row = LAYOUT; row->name; row++) {
        char line[160];
        snprintf(line, sizeof line, "%s %lld %lld", row->name, (long long)row->number, (long long)row->bytes);
        digest += checksum(line, (int64_t)strlen(line));
    }
    return digest;
}

struct Opening {
    PlanFile& plan;
    Reader file;
    int threads;
    Problem& problem;
    Stored stored;
    Array<Reach> reaches;  // of each packed weight
    int64_t left;  // bytes that packed weights may take in all, so that no small file asks for any amount
    int64_t left_values = INT64_C(256) << 20;  // the same of values of a run; more, the larger the input

    Opening(PlanFile& plan_, const void* bytes, int64_t size, int threads_, Problem& problem_)
        : plan(plan_),
          file(bytes, size),
          threads(threads_),
          problem(problem_),
          stored(plan_, problem_),
          left(256 * size + (INT64_C(1) << 28)) {}

    bool damaged(const char* what) { return problem.say("the plan is damaged: %s; export it again.", what); }
    bool whole(const char* what) { return !file.failed || damaged(what); }

    bool packed_well(Fault fault) {
        if (fault == Fault::NONE) return true;
        if (fault == Fault::MEMORY) return problem.no_memory(0);
        return damaged("a weight does not fit the op that uses it");
    }

    bool read_pack(Pack& pack, Reach& reach) {
        Recipe& recipe = pack.recipe;
        const int64_t number = file.word_in(0, stored.weights.count - 1);
        recipe.packing = file.word();
        recipe.rows = file.word_in(1, INT32_MAX);
        recipe.inner = file.word_in(1, INT32_MAX);
        recipe.kernel = file.word_in(1, INT32_MAX);
        recipe.groups = file.word_in(1, INT32_MAX);
        recipe.phases = file.word_in(1, INT64_C(1) << 16);
        recipe.channel = file.word_in(1, INT64_C(1) << 31);
        recipe.per_block = file.word_in(1, INT64_C(1) << 31);
        const int64_t offsets = file.word(), length = file.word_in(0, INT64_C(1) << 31);
        pack.tile = file.word_in(0, INT64_C(1) << 10);
        if (!whole("a recipe is out of range")) return false;
        recipe.offsets = (const int32_t*)stored.table(offsets, INT32S);
        if (!recipe.offsets) return false;
        recipe.taps = ((const TableHead*)recipe.offsets)[-1].count;
        // An op with tiles is shared by tiles first; GEMV, which has none, by output channels.
        recipe.split = threads;
        if (pack.tile) {
            const Share shared = share(threads, length ? length : 1, pack.tile, recipe.phases);
            pack.tile = shared.tile;
            recipe.split = shared.parts;
        }
        const Weight* weight = stored.weight(number);
        if (!weight) return false;
        // What is read counts too: a mask of zeros may be shorter in the file than in memory, and the taps of each
        // phase are compared with those of all others.
        left -= weight->size / 8 + recipe.phases * recipe.taps;
        Sizes sizes{};
        if (left >= 0 && !packed_well(measure(recipe, *weight, sizes))) return false;
        const int64_t nbytes = sizes.values * weight->width + sizes.offsets * 2 + sizes.entries * sizeof(Entry) +
                               sizes.blocks * sizeof(Block) + sizes.parts * sizeof(Part) + sizes.scratch;
        left -= nbytes;
        if (left < 0) return damaged("its weights take more memory than a file of its size is granted");
        const bool coded = weight->width == 1;
        if (coded ? !pack.codes.make(sizes.values, problem) : !pack.values.make(sizes.values, problem)) return false;
        if (!pack.offsets.make(sizes.offsets, problem) || !pack.entries.make(sizes.entries, problem) ||
            !pack.blocks.make(sizes.blocks, problem) || !pack.parts.make(sizes.parts, problem))
            return false;
        const Packed packed = {coded ? (void*)pack.codes.data : pack.values.data, pack.offsets.data, pack.entries.data,
                               pack.blocks.data, pack.parts.data};
        if (!packed_well(fill(recipe, *weight, sizes, packed))) return false;
        reach = {sizes.lowest, sizes.highest, recipe.rows, recipe.phases, sizes.values, coded,
                 recipe.packing != (int64_t)Packing::SPARSE};
        return true;
    }

    // Counts floats that a run needs. The limit is that of sessions (graph/limits.py).
    bool claim(int64_t floats) {
        left_values -= 4 * floats;
        return left_values >= 0 || damaged("its values take more memory than an input of its size is granted");
    }

    bool read_exchanged() {
        if (!plan.exchanged.make(file.count(24), problem)) return false;
        for (Exchanged& array : plan.exchanged) {
            array.entries = file.word_in(1, INT64_C(1) << 40);
            array.role = file.word_in(0, 2);
            array.index = file.word_in(0, INT32_MAX);
            if (!whole("an array is out of range")) return false;
            const Array<Value>& values = array.role == 1 ? plan.inputs : plan.outputs;
            if (array.role && (array.index >= values.count || values[array.index].entries != array.entries))
                return damaged("an array is no input or output");
            if (!array.role && !claim(array.entries)) return false;
            if (!array.role && !array.own.make(array.entries, problem)) return false;
        }
        return true;
    }

    // Whether a step may run so often. Each run may take as long as all memory allows, so only what the caller knows,
    // the first axis of an input, multiplies it.
    bool is_batch(int64_t images) const {
        bool found = images == 1;
        for (const Value& input : plan.inputs) found |= images == input.shape[0];
        return found;
    }

    bool read_step(Step& step, int64_t& next_op) {
        step.images = file.word_in(1, INT64_C(1) << 31);
        if (!is_batch(step.images)) return damaged("a step runs more often than the batch has images");
        // A step without arrays could run any number of times.
        const int64_t arrays = file.word_in(1, MAX_BUFFERS - 2);
        if (!step.arrays.make(arrays, problem) || !step.steps.make(arrays + 1, problem)) return false;
        Array<int64_t> entries;
        if (!entries.make(arrays + 1, problem)) return false;
        entries[0] = plan.arena_floats;
        for (int64_t b = 0; b < arrays; b++) {
            step.arrays[b] = file.word_in(0, plan.exchanged.count - 1);
            step.steps[b + 1] = entries[b + 1] = file.word_in(1, INT64_C(1) << 40);
            if (!whole("an array is out of range")) return false;
            if ((__int128)step.images * entries[b + 1] > plan.exchanged[step.arrays[b]].entries)
                return damaged("an array is too short");
        }
        const int64_t count = file.count(8 + sizeof(Op));
        step.first_op = next_op;
        step.op_count = count;
        if (!whole("a step is cut off") || next_op + count > plan.ops.count) return damaged("it has too many ops");
        const Space space = {plan.level->lanes, plan.level->widest, plan.level->widest_dense, arrays + 1, entries.data};
        for (int64_t i = 0; i < count; i++)
            if (!read_op(plan.ops[next_op + i], step, space)) return false;
        next_op += count;
        return true;
    }

    bool read_op(Op& op, const Step& step, const Space& space) {
        const int64_t number = file.word_in(-1, plan.packs.count - 1);
        const void* bytes = file.block(sizeof(Op));
        if (!whole("an op is cut off")) return false;
        memcpy((void*)&op, bytes, sizeof op);
        int64_t member = 0;
        const char* owner = parameters_of(op.kind, &member);
        for (const PointerField& field : FIELDS) {
            const bool common = !field.owner;
            if (field.type == -2 || !(common || (owner && !strcmp(owner, field.owner)))) continue;
            char* place = (char*)&op + field.offset + (common ? 0 : member);
            int64_t id;
            memcpy(&id, place, 8);
            const void* pointer = nullptr;
            // Pointers into packed weights are set below.
            if (field.type >= 0 && id && !(pointer = stored.table(id < 0 ? id : id - 1, field.type))) return false;
            memcpy(place, &pointer, sizeof pointer);
        }
        const bool to_array = op.out_buffer > 0 && op.out_buffer < space.buffers;
        if (to_array && plan.exchanged[step.arrays[op.out_buffer - 1]].role == 1)
            return damaged("an op writes to an input");
        const bool weighs = op.kind == SPMM || op.kind == GEMV;
        if (weighs != (number >= 0)) return damaged("an op has no weight, or one too many");
        if (number < 0) return check_op(op, space, nullptr, problem);
        const Pack& pack = plan.packs[number];
        const bool rows = pack.recipe.packing == (int64_t)Packing::ROWS;
        if ((op.kind == SPMM) != (pack.tile > 0) || (op.kind == SPMM && rows))
            return damaged("a weight does not fit its op");
        if (op.kind == SPMM) {
            point(op.spmm, pack);
            op.spmm.tile = pack.tile;
        } else {
            // One tap, and an input of single floats: how GEMV packs a matrix.
            const Recipe& recipe = pack.recipe;
            if (!rows && (recipe.packing != (int64_t)Packing::SPARSE || recipe.phases != 1 || recipe.groups != 1))
                return damaged("a weight does not fit its op");
            point(op.gemv, pack);
        }
        return check_op(op, space, &reaches[number], problem);
    }

    template <class P>
    static void point(P& op, const Pack& pack) {
        op.values = pack.values.data;
        op.codes = pack.codes.data;
        op.offsets = pack.offsets.data;
        op.entries = pack.entries.data;
        op.blocks = pack.blocks.data;
        op.parts = pack.parts.data;
        op.part_count = pack.parts.count;
        if (!pack.codes.data) op.scales = nullptr;
    }

    bool read_level() {
        constexpr int64_t MOST = (INT64_C(1) << 40) / 40000;
        for (const Value& input : plan.inputs)
            if (left_values < 40000 * MOST) left_values += 40000 * (input.entries < MOST ? input.entries : MOST);
        plan.arena_floats = file.word_in(0, INT64_C(1) << 36);
        if (!claim(plan.arena_floats)) return false;
        if (!plan.packs.make(file.count(96), problem) || !reaches.make(plan.packs.count, problem)) return false;
        for (int64_t i = 0; i < plan.packs.count; i++)
            if (!read_pack(plan.packs[i], reaches[i])) return false;
        if (!read_exchanged() || !plan.steps.make(file.count(24), problem)) return false;
        if (!plan.ops.make(file.count(8 + sizeof(Op)), problem)) return false;
        int64_t ops = 0;
        for (Step& step : plan.steps)
            if (!read_step(step, ops)) return false;
        return whole("a level is cut off");
    }

    // Goes to the best level that this processor runs and the file has.
    bool choose_level() {
        int known;
        const Level* const* levels = all_levels(&known);
        int best = known;
        Reader chosen(nullptr, 0);
        char names[120] = "";
        const int64_t count = file.count(40);
        for (int64_t i = 0; i < count && !file.failed; i++) {
            const char* name = file.string();
            const int64_t lanes = file.word(), widest = file.word(), widest_dense = file.word(), size = file.word();
            const void* bytes = file.block(size);
            if (!whole("a level is cut off")) return false;
            if (strlen(names) + strlen(name) + 3 < sizeof names) strcat(strcat(names, *names ? ", " : ""), name);
            for (int k = 0; k < best; k++) {
                if (strcmp(levels[k]->name, name) || !runs_here(name)) continue;
                if (levels[k]->lanes != lanes || levels[k]->widest != widest || levels[k]->widest_dense != widest_dense)
                    return problem.say("the plan is for other kernels of level %s; export it again.", name);
                best = k;
                chosen = Reader(bytes, size);
            }
        }
        if (!whole("a level is cut off")) return false;
        if (file.now != file.end) return damaged("it has bytes after its end");
        if (best < known) {
            plan.level = levels[best];
            file = chosen;
            return true;
        }
        char here[120] = "";
        for (int k = 0; k < known; k++)
            if (runs_here(levels[k]->name)) strcat(strcat(here, *here ? ", " : ""), levels[k]->name);
        return problem.say(
            "the plan is for processors with %s, and this one runs %s; export it with --level %s, or without --level.",
            *names ? names : "nothing", here, here);
    }
};

}  // namespace

bool PlanFile::read(const void* bytes, int64_t size, int threads, Problem& problem) {
    if (size < HEAD_BYTES || memcmp(bytes, MAGIC, sizeof MAGIC))
        return problem.say("it is no plan file; make one with `dsr-tool export MODEL_DIR -o model.dsrplan`.");
    int64_t head[5];
    memcpy(head, (const char*)bytes + sizeof MAGIC, sizeof head);
    const auto [version, interface, layout, total, sum] = head;
    if (version > VERSION)
        return problem.say("the plan has format %lld, newer than this library; install a newer dsr-tool.",
                           (long long)version);
    if (version < 1)
        return problem.say("the plan is damaged: its format is %lld; export it again.", (long long)version);
    if (interface != INTERFACE || layout != (int64_t)layout_digest())
        return problem.say("the plan was made for another version of the library (interface %lld, layout %llx; here "
                           "%lld, %llx); export it again with the dsr-tool that this library belongs to.",
                           (long long)interface, (long long)layout, (long long)INTERFACE, (long long)layout_digest());
    if (total != size)
        return problem.say("the plan has %lld bytes instead of %lld; copy the file again.", (long long)size,
                           (long long)total);
    const char* body = (const char*)bytes + HEAD_BYTES;
    if (sum != (int64_t)checksum(body, size - HEAD_BYTES))
        return problem.say("the plan is damaged: its checksum does not fit; copy the file again.");
    Opening opening(*this, body, size - HEAD_BYTES, threads, problem);
    return opening.stored.read(opening.file) && opening.choose_level() &&
           opening.read_level();
}

}  // namespace dsr
