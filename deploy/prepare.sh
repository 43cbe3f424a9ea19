#!/bin/sh
# Run once as root before the daemon starts: its folders, and the token that its page asks for.
# USER_ID owns them; TOKEN, if given, is a file whose token is taken, else one is made up.
set -eu
user=${USER_ID:-10001}
install -d -m 0700 -o "$user" -g "$user" /var/lib/kvshare
install -d -m 0700 -o "$user" -g "$user" /run/kvshare
if [ -n "${TOKEN:-}" ]; then
    install -m 0600 -o "$user" -g "$user" "$TOKEN" /run/kvshare/token
elif [ ! -s /run/kvshare/token ]; then
    (umask 077 && head -c 32 /dev/urandom | base64 > /run/kvshare/token)
    chown "$user:$user" /run/kvshare/token
fi
for folder in "$@"; do
    install -d -m 0700 -o "$user" -g "$user" "$folder"
done
