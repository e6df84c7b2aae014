#!/bin/sh
# The client and the wire as a user without torch installs them: `pip install .`, nothing else but the test runner.
# Once on protobuf 6 and once on 7, since a user's other packages may need either.
set -eu
cd "$(dirname "$0")/.."
for major in 6 7; do
  venv=.venv-protobuf$major
  if [ ! -x $venv/bin/pytest ]; then
    "${PYTHON:-python3}" -m venv $venv
    $venv/bin/python -m pip install -q --disable-pip-version-check pytest pytest-timeout hypothesis
  fi
  $venv/bin/python -m pip install -q --disable-pip-version-check --force-reinstall --no-deps .
  $venv/bin/python -m pip install -q --disable-pip-version-check . "protobuf>=$major,<$((major + 1))"
  if $venv/bin/python -c "import torch" 2>/dev/null; then
    echo "a client's environment holds torch" >&2
    exit 1
  fi
  echo "== protobuf $($venv/bin/python -c 'import google.protobuf; print(google.protobuf.__version__)')"
  $venv/bin/python -m pytest -q tests/unit/test_wire_*.py tests/unit/test_client_*.py tests/unit/test_session_client.py
done
