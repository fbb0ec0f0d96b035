#!lua flags=allow-oom
-- End a running job with its answer, if the worker still holds it.
-- ARGV: mode ("free" only deletes the inputs), fence, worker, state, code, detail, timings, payload, output bytes.
-- Returns "ok", "freed", "canceled" or "late".
local mine, j = held(ARGV[2], ARGV[3])
if not mine then
  if j[1] == ARGV[4] and j[2] == ARGV[2] and j[3] == ARGV[3] then
    return 'ok' -- the same commit again, after a lost connection
  end
  return 'late'
end
if ARGV[1] == 'free' then
  for i = 7, #KEYS do
    redis.call('UNLINK', KEYS[i])
  end
  return 'freed'
end
if redis.call('HEXISTS', KEYS[1], 'cx') == 1 then
  return finish('canceled', '', '')
end
finish(ARGV[4], ARGV[5], ARGV[6], { 'tm', ARGV[7], 'p', ARGV[8], 'ob', ARGV[9], 'f', ARGV[2] })
return 'ok'
