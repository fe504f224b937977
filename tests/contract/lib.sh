# Sourced by the checks: paths, protoc, and a server to talk to.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[1]}")" && pwd)"
root="$(cd "$here/../../.." && pwd)"
build="$root/build/contract/$(basename "$here")"
python="$root/.venv/bin/python"

# The compiler that writes the Python stubs too. The checks say which files, relative to proto/.
protoc() {
  "$python" -m grpc_tools.protoc --proto_path="$root/proto/third_party" --proto_path="$root/proto" "$@"
}

# Starts a server on a free port, sets `address`, and stops the server when the check ends.
# SERVER can be another command that takes the same options.
start_server() {
  local log="$build/server.log"
  address="127.0.0.1:$("$python" -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')"
  # shellcheck disable=SC2086 -- SERVER may have arguments
  ${SERVER:-"$root/.venv/bin/paceline" serve} --listen "$address" --store embedded: --metrics-listen off >"$log" 2>&1 &
  server=$!
  trap 'kill "$server" 2>/dev/null; wait "$server" 2>/dev/null || true' EXIT
  if ! "$root/.venv/bin/paceline" health --address "$address" --wait 20 >/dev/null; then
    echo "error: the server did not start:" >&2
    cat "$log" >&2
    exit 1
  fi
}
