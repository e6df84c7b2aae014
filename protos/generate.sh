#!/usr/bin/env bash
# Generates the Python code of the contract into DEST (default: beside the .proto files).
# The compiler is pinned to one whose output runs on protobuf 6 and 7; it gets a venv of its own, because the compiler
# and the runtime that the project uses need different protobuf versions.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dest=${1:-$here}
venv=${PROTO_VENV:-$here/../.venv-proto}
if [ ! -x "$venv/bin/protoc-gen-mypy" ]; then
  "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/pip" install -q grpcio-tools==1.76.0 mypy-protobuf==3.7.0 "setuptools<81"
fi
cd "$here"
# Services are called through raw bytes (see pullback_wire.methods), so no grpc stubs are generated.
PATH="$venv/bin:$PATH" "$venv/bin/python" -m grpc_tools.protoc -I. \
  --python_out="$dest" --mypy_out="quiet:$dest" pullback_wire/v1/*.proto pullback_wire/inference/*.proto
# A process has one pool of descriptors by default, in which a name has one meaning: whoever also imports another client of
# the Open Inference Protocol would be refused. Ours go into a pool of their own.
sed -i 's/_descriptor_pool\.Default()/_descriptor_pool.DescriptorPool()/' "$dest"/pullback_wire/inference/*_pb2.py
