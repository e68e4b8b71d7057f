// llama-probe: what llama.cpp itself makes of a GGUF file, as bytes a program can compare.
//
//   llama-probe logits MODEL [THREADS]   stdin: sequences of token ids    stdout: one row of logits a token
//   llama-probe tokenize MODEL           stdin: texts                     stdout: token ids
//   llama-probe generate MODEL [THREADS] stdin: settings and prompts      stdout: what the model writes
//
// All read records until the end of stdin and answer each before reading the next. All numbers are
// little-endian 32-bit words; a record is a count followed by that many items.
//   logits    stdout starts with the words n_vocab and n_ctx_train;
//             record in: n, n token ids;         record out: n * n_vocab floats, row t for what follows token t
//   tokenize  record in: n, n bytes of UTF-8;    record out: n, n token ids (none added, no markup parsed)
//   generate  record in: seed, most new tokens, temperature, top-p, repeat penalty (the last three are floats),
//             n, n bytes of prompt;              record out: 1 if the model ended its text itself, n, n bytes
// An error is one line on stderr and exit code 1.

#include "llama.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

// Logits of this many tokens are in memory at once: 128 rows of GPT-2's vocabulary are 26 MB.
constexpr uint32_t BATCH = 128;
// llama.cpp allocates its cache for a whole context at once; it starts this small and grows when a sequence needs it.
constexpr uint32_t SMALLEST_CONTEXT = 256;
// The repeat penalty looks back this far, as in llama.cpp's own programs.
constexpr int32_t PENALTY_TOKENS = 64;

using Model   = std::unique_ptr<llama_model, decltype(&llama_model_free)>;
using Context = std::unique_ptr<llama_context, decltype(&llama_free)>;
using Sampler = std::unique_ptr<llama_sampler, decltype(&llama_sampler_free)>;

struct Settings {
    uint32_t seed;
    uint32_t most_tokens;
    float temperature;
    float top_p;
    float repeat_penalty;
};

std::string last_error;  // llama.cpp reports only through its log

void keep_errors(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) {
        last_error = text;
        last_error.erase(last_error.find_last_not_of("\n") + 1);
    }
}

[[noreturn]] void fail(const std::string & what) {
    throw std::runtime_error(last_error.empty() ? what : what + ": " + last_error);
}

// False at the end of stdin; a record cut short is an error.
bool read_bytes(void * data, size_t size) {
    const size_t got = fread(data, 1, size, stdin);
    if (got != size && got != 0) fail("the input ends inside a record");
    return got == size;
}

bool read_record(std::vector<char> & items, size_t item_size) {
    uint32_t count = 0;
    if (!read_bytes(&count, sizeof count)) return false;
    items.resize(count * item_size);
    if (!read_bytes(items.data(), items.size())) fail("the input ends inside a record");
    return true;
}

void write_bytes(const void * data, size_t size) {
    if (fwrite(data, 1, size, stdout) != size) fail("cannot write the output");
}

void flush() {
    if (fflush(stdout) != 0) fail("cannot write the output");
}

Model load(const char * path, bool vocab_only) {
    llama_model_params params = llama_model_default_params();
    params.vocab_only = vocab_only;
    Model model(llama_model_load_from_file(path, params), llama_model_free);
    if (!model) fail(std::string("cannot load ") + path);
    return model;
}

Context open_context(llama_model * model, uint32_t size, int threads, bool exact) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = size;
    params.n_batch = params.n_ubatch = BATCH;
    params.n_threads = params.n_threads_batch = threads;
    if (exact) {
        // Keys and values as computed, and plain attention: the numbers are compared with float32 torch, and the
        // default F16 cache would add its own rounding to that of the weights.
        params.type_k = params.type_v = GGML_TYPE_F32;
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    }
    Context context(llama_init_from_model(model, params), llama_free);
    if (!context) fail("cannot open a context of " + std::to_string(size) + " tokens");
    return context;
}

void check(const llama_token * ids, uint32_t n, uint32_t n_ctx_train, int32_t n_vocab) {
    // Past its last row llama.cpp aborts in a learned position table (GPT-2), and invents positions elsewhere.
    if (n > n_ctx_train) {
        fail("a sequence of " + std::to_string(n) + " tokens is longer than the model's context of " +
             std::to_string(n_ctx_train));
    }
    for (uint32_t i = 0; i < n; i++) {
        if (ids[i] < 0 || ids[i] >= n_vocab) {
            fail("token id " + std::to_string(ids[i]) + " is outside the vocabulary of " + std::to_string(n_vocab));
        }
    }
}

void write_logits(llama_context * context, llama_token * ids, uint32_t n, int32_t n_vocab) {
    std::vector<int8_t> every(BATCH, 1);
    llama_memory_clear(llama_get_memory(context), true);
    for (uint32_t start = 0; start < n; start += BATCH) {
        const uint32_t rows = std::min(BATCH, n - start);
        llama_batch batch = llama_batch_get_one(ids + start, static_cast<int32_t>(rows));
        batch.logits = every.data();
        if (llama_decode(context, batch) != 0) fail("llama.cpp cannot evaluate a sequence");
        write_bytes(llama_get_logits(context), sizeof(float) * rows * n_vocab);
    }
    flush();
}

void run_logits(const char * path, int threads) {
    const Model model = load(path, false);
    const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model.get()));
    const auto n_ctx_train = static_cast<uint32_t>(llama_model_n_ctx_train(model.get()));
    const uint32_t header[2] = { static_cast<uint32_t>(n_vocab), n_ctx_train };
    write_bytes(header, sizeof header);
    flush();

    Context context(nullptr, llama_free);
    uint32_t size = SMALLEST_CONTEXT;
    std::vector<char> record;
    while (read_record(record, sizeof(llama_token))) {
        const auto n = static_cast<uint32_t>(record.size() / sizeof(llama_token));
        auto * ids = reinterpret_cast<llama_token *>(record.data());
        check(ids, n, n_ctx_train, n_vocab);
        if (!context || n > size) {
            while (size < n) size *= 2;
            context.reset();
            context = open_context(model.get(), size, threads, true);
        }
        write_logits(context.get(), ids, n, n_vocab);
    }
}

std::vector<llama_token> tokenize(const llama_vocab * vocab, const std::vector<char> & text, bool add_begin) {
    std::vector<llama_token> ids(text.size() + 2);
    int32_t n = 0;
    while ((n = llama_tokenize(vocab, text.data(), static_cast<int32_t>(text.size()), ids.data(),
                               static_cast<int32_t>(ids.size()), add_begin, false)) < 0) {
        if (n == INT32_MIN) fail("a text is too long");
        ids.resize(static_cast<size_t>(-n));
    }
    ids.resize(static_cast<size_t>(n));
    return ids;
}

void run_tokenize(const char * path) {
    const Model model = load(path, true);
    std::vector<char> text;
    while (read_record(text, 1)) {
        const auto ids = tokenize(llama_model_get_vocab(model.get()), text, false);
        const auto n = static_cast<uint32_t>(ids.size());
        write_bytes(&n, sizeof n);
        write_bytes(ids.data(), sizeof(llama_token) * n);
        flush();
    }
}

// Penalty, nucleus, temperature, draw: llama.cpp's own order, and no filter that the settings do not name.
Sampler make_sampler(const Settings & settings, int32_t n_vocab) {
    Sampler chain(llama_sampler_chain_init(llama_sampler_chain_default_params()), llama_sampler_free);
    llama_sampler_chain_add(chain.get(),
                            llama_sampler_init_penalties(n_vocab, PENALTY_TOKENS, settings.repeat_penalty, 0.0f, 0.0f));
    if (settings.temperature > 0) {
        llama_sampler_chain_add(chain.get(), llama_sampler_init_top_p(settings.top_p, 1));
        llama_sampler_chain_add(chain.get(), llama_sampler_init_temp(settings.temperature));
        llama_sampler_chain_add(chain.get(), llama_sampler_init_dist(settings.seed));
    } else {
        llama_sampler_chain_add(chain.get(), llama_sampler_init_greedy());
    }
    return chain;
}

void evaluate(llama_context * context, llama_token * ids, size_t n) {
    for (size_t start = 0; start < n; start += BATCH) {
        const auto rows = static_cast<int32_t>(std::min<size_t>(BATCH, n - start));
        if (llama_decode(context, llama_batch_get_one(ids + start, rows)) != 0) fail("llama.cpp cannot evaluate");
    }
}

std::string piece(const llama_vocab * vocab, llama_token id) {
    std::string text(32, '\0');
    int32_t n = llama_token_to_piece(vocab, id, text.data(), static_cast<int32_t>(text.size()), 0, false);
    if (n < 0) {
        text.resize(static_cast<size_t>(-n));
        n = llama_token_to_piece(vocab, id, text.data(), static_cast<int32_t>(text.size()), 0, false);
    }
    return text.substr(0, static_cast<size_t>(n));
}

// True if the model ended its text by a token of its own.
bool generate(llama_model * model, std::vector<llama_token> ids, const Settings & settings, int threads,
              std::string & text) {
    const auto n_ctx_train = static_cast<size_t>(llama_model_n_ctx_train(model));
    if (ids.empty()) fail("an empty prompt needs a model with a begin token");
    if (ids.size() >= n_ctx_train) fail("the prompt fills the model's context of " + std::to_string(n_ctx_train));
    const size_t limit = std::min<size_t>(settings.most_tokens, n_ctx_train - ids.size());
    const Context context = open_context(model, static_cast<uint32_t>(ids.size() + limit), threads, false);
    const llama_vocab * vocab = llama_model_get_vocab(model);
    const Sampler sampler = make_sampler(settings, llama_vocab_n_tokens(vocab));
    for (const llama_token id : ids) llama_sampler_accept(sampler.get(), id);
    for (size_t made = 0; made < limit; made++) {
        evaluate(context.get(), ids.data(), ids.size());
        ids = { llama_sampler_sample(sampler.get(), context.get(), -1) };
        if (llama_vocab_is_eog(vocab, ids[0])) return true;
        text += piece(vocab, ids[0]);
    }
    return false;
}

// Not llama-completion: it takes a prompt that ends in an end token for an ended text, so it writes nothing after
// GPT-2's begin token, which is its end token, alone.
void run_generate(const char * path, int threads) {
    const Model model = load(path, false);
    Settings settings;
    std::vector<char> prompt;
    while (read_bytes(&settings, sizeof settings)) {
        if (!read_record(prompt, 1)) fail("the input ends inside a record");
        std::string text;
        const auto ids = tokenize(llama_model_get_vocab(model.get()), prompt, true);
        const uint32_t stopped = generate(model.get(), ids, settings, threads, text) ? 1 : 0;
        const auto n = static_cast<uint32_t>(text.size());
        write_bytes(&stopped, sizeof stopped);
        write_bytes(&n, sizeof n);
        write_bytes(text.data(), n);
        flush();
    }
}

}  // namespace

int main(int argc, char ** argv) {
    const std::string verb = argc > 1 ? argv[1] : "";
    llama_log_set(keep_errors, nullptr);
    llama_backend_init();
    const int threads = argc == 4 ? std::max(1, atoi(argv[3])) : 1;
    try {
        if (verb == "logits" && (argc == 3 || argc == 4)) {
            run_logits(argv[2], threads);
        } else if (verb == "generate" && (argc == 3 || argc == 4)) {
            run_generate(argv[2], threads);
        } else if (verb == "tokenize" && argc == 3) {
            run_tokenize(argv[2]);
        } else {
            fail("usage: llama-probe logits|generate MODEL [THREADS] | llama-probe tokenize MODEL");
        }
    } catch (const std::exception & e) {
        fprintf(stderr, "llama-probe: %s\n", e.what());
        return 1;
    }
    llama_backend_free();
    return 0;
}
