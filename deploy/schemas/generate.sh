#!/bin/sh
# Writes the schemas of this folder anew. Needs node, npm, curl, Python with PyYAML (PYTHON), and the network.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp "$here/wanted.ts" "$work"
cd "$work"
cat > tsconfig.json <<'EOF'
{"compilerOptions": {"module": "esnext", "moduleResolution": "bundler", "target": "es2022", "skipLibCheck": true, "strict": true}}
EOF
npm init --yes > /dev/null
npm install --silent ts-json-schema-generator@2.4.0 \
    @kubernetes-models/prometheus-operator@6.0.0 @kubernetes-models/cert-manager@6.0.0 @kubernetes-models/keda@2.0.0
for kind in PodMonitor PrometheusRule ScaledObject Certificate Issuer; do
    npx ts-json-schema-generator --tsconfig tsconfig.json --path wanted.ts --type "$kind" \
        --no-type-check --jsDoc none --no-ref-encode --out "$here/$kind.json"
done
for kind in ServingRuntime InferenceService; do
    name=$(echo "$kind" | tr '[:upper:]' '[:lower:]')
    curl -fsSL -o "$name.yaml" \
        "https://raw.githubusercontent.com/kserve/kserve/v0.20.0/config/crd/full/serving.kserve.io_${name}s.yaml"
    "${PYTHON:-python3}" "$here/from_crd.py" "$name.yaml" "$here/../kserve/$name.yaml" "$here/$kind.json"
done
