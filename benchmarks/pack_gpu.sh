#!/usr/bin/env bash
# Packs what benchmarks/gpu.py needs on a machine with a GPU, Python 3.12, torch, transformers, typer and pytest, but
# without a network, diffusers, PyAV or ffmpeg; and says whether all that travels stays below a limit.
#
#   bash benchmarks/pack_gpu.sh                  builds build/gpu/site.tar.xz (ignored by git: it is carried besides)
#   bash benchmarks/pack_gpu.sh --thin           also takes out of the checkout what no step needs, as git sparse-checkout
#                                                does; `git sparse-checkout disable` brings it back
#   bash benchmarks/pack_gpu.sh [--thin] jinja2  carries more packages
#
# PYTHON=python3       the interpreter whose pip downloads; it may be of another version than TARGET
# TARGET=3.12          Python over there
# LIMIT=67108864       bytes of the checkout and what is carried
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3} target=${TARGET:-3.12} limit=${LIMIT:-67108864}
carried=build/gpu/site.tar.xz
unneeded=('/tests/data/' '/streamt2v/demo/image_to_video.safetensors' '/docs/*.png' '/benchmarks/judge.safetensors')
thin=
if [ "${1:-}" = --thin ]; then thin=yes; shift; fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The versions that are tested here, where they are installed; every dependency but these two is there already.
packages=()
for name in av diffusers "$@"; do
    version=$("$python" -c "from importlib.metadata import version; print(version('$name'))" 2> /dev/null || true)
    packages+=("$name${version:+==$version}")
done
"$python" -m pip download --quiet --no-deps --only-binary :all: --python-version "$target" --implementation cp \
    --abi "cp${target/./}" --abi abi3 --abi none --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
    --dest "$work/wheels" "${packages[@]}"
for wheel in "$work"/wheels/*.whl; do "$python" -m zipfile -e "$wheel" "$work/site"; done
# A third of PyAV's libraries is symbols for debuggers.
find "$work/site" -name '*.so*' -type f -exec strip --strip-unneeded {} +
mkdir -p "$(dirname "$carried")"
tar --create --sort=name --owner=0 --group=0 --mtime=@0 --directory "$work/site" . | xz -6 --threads=0 > "$carried"

if [ -n "$thin" ]; then git sparse-checkout set --no-cone '/*' "${unneeded[@]/#/!}"; fi

bytes() { while IFS= read -r -d '' file; do [ ! -f "$file" ] || stat --format=%s "$file"; done | awk '{ sum += $1 } END { print sum + 0 }'; }
tree=$(git ls-files -z --cached --others --exclude-standard | bytes)
load=$(printf '%s\0' "$carried" | bytes)
printf '%-44s %9.1f MiB\n' "checkout, tracked and not ignored" "$(awk "BEGIN { print $tree / 2^20 }")" \
    "$carried (${packages[*]})" "$(awk "BEGIN { print $load / 2^20 }")" \
    "together, of $(awk "BEGIN { print $limit / 2^20 }") MiB" "$(awk "BEGIN { print ($tree + $load) / 2^20 }")"
if [ $((tree + load)) -gt "$limit" ]; then
    echo "too much: take out of the checkout what no step needs, with --thin: ${unneeded[*]}" >&2
    exit 1
fi
cat << COMMAND
carry $carried; over there:
  mkdir -p /tmp/site && tar -xf $carried -C /tmp/site && PYTHONPATH=/tmp/site python3 benchmarks/gpu.py --out "\$OUT"
COMMAND
