#!/bin/sh
# Writes the schemas of this folder anew. Needs node, npm and the network.
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
