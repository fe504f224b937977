-- Keep a lone mark.
-- KEYS: the head
-- ARGV: epoch, nonce, check
-- answer: ok, now, head
--         fenced, now, head

local now = time()
local head = load(KEYS[1])
if not owned(head, ARGV[1], ARGV[2]) then
  return answer('fenced', now, head)
end
head[CHECK] = ARGV[3]
put(KEYS[1], head, CHECK)
return answer('ok', now, head)
