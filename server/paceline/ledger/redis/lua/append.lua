-- Accept a record behind the last one, and extend the lease.
-- KEYS: the head, the log
-- ARGV: epoch, nonce, seq, previous, hash, at, lease_us, the packed record
-- answer: ok, now, head (also for an identical resend)
--         fenced, now, head

local seq, hash = ARGV[3], ARGV[5]
local now = time()
local head = load(KEYS[1])
if not owned(head, ARGV[1], ARGV[2]) then
  return answer('fenced', now, head)
end
local resent = head[SEQ] == seq and head[HASH] == hash
if not resent and (int(tonumber(head[SEQ]) + 1) ~= seq or head[HASH] ~= ARGV[4]) then
  return answer('fenced', now, head)
end
head[CONFIRMED_AT] = int(now)
head[UNTIL] = int(now + tonumber(ARGV[7]))
if resent then
  put(KEYS[1], head, CONFIRMED_AT, UNTIL)
  return answer('ok', now, head)
end
-- The log first: it refuses a number that does not ascend, and then nothing is written.
redis.call('XADD', KEYS[2], seq .. '-0', 'r', ARGV[8])
head[SEQ] = seq
head[HASH] = hash
head[AT] = ARGV[6]
head[WRITTEN_AT] = head[CONFIRMED_AT]
head[SUCCESSOR] = ''
put(KEYS[1], head, SEQ, HASH, AT, WRITTEN_AT, CONFIRMED_AT, UNTIL, SUCCESSOR)
return answer('ok', now, head)
