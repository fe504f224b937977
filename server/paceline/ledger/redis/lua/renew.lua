-- Extend the lease without a record.
-- KEYS: the head
-- ARGV: epoch, nonce, seq, hash, lineage, lease_us
-- answer: ok, now, head
--         fenced, now, head

local now = time()
local head = load(KEYS[1])
if not owned(head, ARGV[1], ARGV[2]) or head[SEQ] ~= ARGV[3] or head[HASH] ~= ARGV[4] then
  return answer('fenced', now, head)
end
head[CONFIRMED_AT] = int(now)
head[UNTIL] = int(now + tonumber(ARGV[6]))
head[LINEAGE] = ARGV[5]
head[SUCCESSOR] = ''
put(KEYS[1], head, CONFIRMED_AT, UNTIL, LINEAGE, SUCCESSOR)
return answer('ok', now, head)
