-- Let a snapshot count whose parts are written; drop the one before, and the records that it makes needless.
-- KEYS: the head, the log, the snapshot
-- ARGV: epoch, nonce, name, seq, at, hash, digest, chunks, keep_after
-- answer: ok, now, head
--         fenced, now, head
--         gone, now, head: the snapshot is not whole

local name, seq = ARGV[3], tonumber(ARGV[4])
local now = time()
local head = load(KEYS[1])
if not owned(head, ARGV[1], ARGV[2]) or seq > tonumber(head[SEQ]) or seq < tonumber(head[SNAPSHOT_SEQ]) then
  return answer('fenced', now, head)
end
if redis.call('HLEN', KEYS[3]) ~= tonumber(ARGV[8]) then
  return answer('gone', now, head)
end
local before = head[SNAPSHOT]
head[SNAPSHOT] = name
head[SNAPSHOT_SEQ] = ARGV[4]
head[SNAPSHOT_AT] = ARGV[5]
head[SNAPSHOT_HASH] = ARGV[6]
head[SNAPSHOT_DIGEST] = ARGV[7]
head[SNAPSHOT_CHUNKS] = ARGV[8]
put(KEYS[1], head, SNAPSHOT, SNAPSHOT_SEQ, SNAPSHOT_AT, SNAPSHOT_HASH, SNAPSHOT_DIGEST, SNAPSHOT_CHUNKS)
redis.call('PERSIST', KEYS[3])
if before ~= '' and before ~= name then
  redis.call('UNLINK', string.sub(KEYS[3], 1, #KEYS[3] - #name) .. before)
end
redis.call('XTRIM', KEYS[2], 'MINID', '=', int(tonumber(ARGV[9]) + 1) .. '-0')
return answer('ok', now, head)
