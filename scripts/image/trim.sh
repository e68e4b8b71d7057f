#!/usr/bin/env bash
# Removes from a virtual environment what a job never reads: scripts/image/trim.sh /opt/venv
#
# - headers and static libraries: nothing is compiled in the image
# - bitsandbytes' libraries for other versions of CUDA than torch's, and for ROCm and XPU
# - torch's test programs, and the packages' own test suites
# - pip: an image is not changed, it is built anew
set -euo pipefail
packages=$(echo "$1"/lib/python3.*/site-packages)

size() { du -sm "$packages" | cut -f1; }
before=$(size)

rm -rf "$packages"/torch/{include,share/cmake,test} "$packages"/torch/bin/{protoc*,*test*}
find "$packages" -type d \( -path '*/nvidia/*/include' -o -path '*/pyarrow/include' -o -path '*/numpy/*/include' \) \
  -prune -exec rm -rf {} +
find "$packages" -name '*.a' -delete
rm -rf "$packages"/{pyarrow,numpy,pandas,networkx,sympy}/tests
find "$packages"/{numpy,sympy,networkx} -type d -name tests -prune -exec rm -rf {} +

cuda=$(sed -n "s/^cuda: .*= '\([0-9]*\)\.\([0-9]*\)'$/\1\2/p" "$packages"/torch/version.py)
for library in "$packages"/bitsandbytes/libbitsandbytes_*.so; do
  case $library in
    *_cpu.so | *_cuda"${cuda:-none}".so) ;;
    *) rm "$library" ;;
  esac
done

"$1"/bin/python -m pip uninstall --yes --quiet pip
echo "trim: $before MB of packages, now $(size) MB"
