-- Let owners write a newer form from now on.
-- KEYS: the head
-- ARGV: epoch, nonce, form
-- answer: ok, now, head
--         fenced, now, head

local now = time()
local head = load(KEYS[1])
if not owned(head, ARGV[1], ARGV[2]) or tonumber(ARGV[3]) < tonumber(head[FORM]) then
  return answer('fenced', now, head)
end
head[FORM] = ARGV[3]
put(KEYS[1], head, FORM)
return answer('ok', now, head)
