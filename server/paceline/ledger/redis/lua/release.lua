-- Let go, in favour of a successor or of anybody.
-- KEYS: the head
-- ARGV: epoch, nonce, seq, hash, successor, grace_us
-- answer: ok, now, head
--         fenced, now, head

local now = time()
local head = load(KEYS[1])
if not owned(head, ARGV[1], ARGV[2]) or head[SEQ] ~= ARGV[3] or head[HASH] ~= ARGV[4] then
  return answer('fenced', now, head)
end
head[UNTIL] = int(now + (ARGV[5] ~= '' and tonumber(ARGV[6]) or 0))
head[SUCCESSOR] = ARGV[5]
put(KEYS[1], head, UNTIL, SUCCESSOR)
return answer('ok', now, head)
